"""The HTTP server: OpenAI's routes, and our own for routing, health, counters and the chat page."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass
from importlib.resources import files
from typing import Any
from urllib.parse import quote

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException

from loramix import __version__
from loramix.errors import LoramixError
from loramix.serving import failures
from loramix.serving.answering import Answering, Shape
from loramix.serving.ask import Ask, Engine, EngineError
from loramix.serving.catalog import Catalog
from loramix.serving.guard import Guard
from loramix.serving.keys import Key, Keys
from loramix.serving.limits import Limits
from loramix.serving.metrics import Metrics
from loramix.serving.prompts import PromptEncoder
from loramix.serving.protocol import ChatRequest, RouteRequest, TextRequest
from loramix.serving.replies import ChatReply, ErrorReply, Health, ModelList, RouteReply, Routing, TextReply
from loramix.serving.sampling import Sampling
from loramix.serving.shapes import ChatShape, TextShape, TokenTexts

_LOG = logging.getLogger("loramix.serving")
_TYPES = {"html": "text/html; charset=utf-8", "css": "text/css; charset=utf-8", "js": "text/javascript; charset=utf-8"}
_ERRORS = (400, 401, 404, 408, 413, 429, 500, 503, 504)


@dataclass(frozen=True)
class Service:
    """All that the routes need.

    Attributes:
        catalog: what may be named as model.
        engine: answers.
        encoder, texts: prompts to ids, tokens to texts.
        limits: of a request.
        metrics: counts.
        vocabulary: how many token ids there are.
        log_prompts: whether prompts and answers go to the log.
    """

    catalog: Catalog
    engine: Engine
    encoder: PromptEncoder
    texts: TokenTexts
    limits: Limits
    metrics: Metrics
    vocabulary: int
    log_prompts: bool = False


def create_app(service: Service, keys: Keys, *, any_host: bool) -> Guard:
    """Returns the server as an ASGI app. Its engine starts and stops with it.

    Args:
        service: what the routes need.
        keys: who may come in.
        any_host: whether requests may name any host; only where keys are needed.
    """

    @asynccontextmanager
    async def running(_: FastAPI) -> AsyncIterator[None]:
        try:
            await service.engine.start()
        except LoramixError as error:
            guard.failed = error
            raise
        try:
            yield
        finally:
            await service.engine.stop()

    app = FastAPI(
        title="loramix", version=__version__, lifespan=running, docs_url=None, redoc_url=None,
        responses={status: {"model": ErrorReply} for status in _ERRORS},
    )  # fmt: skip
    _add_routes(app, service)
    _add_page(app)
    failures.add_to(app)
    _without_422(app)
    guard = Guard(app, keys, service.limits, service.metrics, any_host=any_host)
    return guard


def _add_routes(app: FastAPI, service: Service) -> None:
    @app.get("/health")
    async def health() -> Health:
        """Whether the server can answer."""
        if not service.engine.alive:
            raise EngineError("The engine is not running.", 503)
        return Health()

    @app.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}})
    async def metrics() -> Response:
        """Counters, for Prometheus."""
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/v1/models")
    async def models(request: Request) -> ModelList:
        """The mixture, its experts and the base, as far as the key may use them."""
        return ModelList(data=service.catalog.listed(request.state.key))

    @app.post("/v1/route")
    async def route(asked: RouteRequest, request: Request) -> RouteReply:
        """Which expert would answer, without an answer."""
        ids = await asyncio.to_thread(service.encoder.chat, asked.turns())
        ask = _ask(service, asked, request.state.key, ids, Sampling(max_tokens=1), 1)
        routed = await service.engine.route(ask)
        return RouteReply(model=asked.model, routing=Routing.of(routed))

    streams: dict[int | str, dict[str, Any]] = {200: {"content": {"text/event-stream": {}}}}

    @app.post("/v1/chat/completions", response_model=ChatReply, responses=streams)
    async def chat(asked: ChatRequest, request: Request) -> Any:
        """Answers a conversation; routed, or by the expert that the model's name pins."""
        if asked.top_logprobs is not None and not asked.logprobs:
            raise EngineError("top_logprobs is for logprobs = true. Set it, or leave top_logprobs out.", 400)
        ids = await asyncio.to_thread(service.encoder.chat, asked.messages)
        shape = ChatShape(service.texts, logprobs=asked.wanted_logprobs is not None)
        return await _answer(service, asked, request, ids, shape)

    @app.post("/v1/completions", response_model=TextReply, responses=streams)
    async def complete(asked: TextRequest, request: Request) -> Any:
        """Continues a text that no chat template is put around."""
        if isinstance(asked.prompt, str):
            ids = await asyncio.to_thread(service.encoder.text, asked.prompt)
        else:
            ids = tuple(asked.prompt)
        shape = TextShape(service.texts, logprobs=asked.wanted_logprobs is not None)
        return await _answer(service, asked, request, ids, shape)


async def _answer(
    service: Service, asked: ChatRequest | TextRequest, request: Request, ids: tuple[int, ...], shape: Shape
) -> Any:
    room = service.limits.context - len(ids)
    most = min(service.limits.max_tokens, max(room, 1)) if asked.wanted_tokens is None else asked.wanted_tokens
    sampling = asked.sampling(most, asked.wanted_logprobs)
    ask = _ask(service, asked, request.state.key, ids, sampling, asked.n or 1)
    answering = Answering(service.engine, ask, asked.model, shape, service.metrics)

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    try:
        routed = await answering.begin(gone)
        headers = {"x-loramix-expert": quote(routed.expert or "mixed"), "x-loramix-decision": routed.decision}
        if asked.stream:
            with_usage = asked.stream_options is not None and asked.stream_options.include_usage
            events = _then(answering.stream(with_usage=with_usage), lambda: _log(service, request, ask, answering))
            return StreamingResponse(events, media_type="text/event-stream", headers=headers)
        reply = await answering.whole(gone)
    except BaseException:
        await answering.close()
        raise
    _log(service, request, ask, answering)
    return JSONResponse(reply.model_dump(), headers=headers)


async def _then(events: AsyncGenerator[str], done: Callable[[], None]) -> AsyncIterator[str]:
    """Yields a stream's events, and calls `done` when it ends, also when the client leaves before."""
    try:
        async with aclosing(events):
            async for event in events:
                yield event
    finally:
        done()


def _ask(
    service: Service,
    asked: ChatRequest | TextRequest | RouteRequest,
    key: Key | None,
    ids: tuple[int, ...],
    sampling: Sampling,
    answers: int,
) -> Ask:
    """Returns what the engine is asked.

    Raises:
        EngineError: the request goes beyond a limit, or names no model.
    """
    limits, most = service.limits, sampling.max_tokens
    if not ids:
        raise EngineError("The prompt is empty.", 400)
    if max(ids) >= service.vocabulary or max(sampling.logit_bias, default=0) >= service.vocabulary:
        raise EngineError(f"A token id is beyond the vocabulary of {service.vocabulary}.", 400)
    if most > limits.max_tokens:
        raise EngineError(f"max_tokens = {most}: this server writes {limits.max_tokens} at most.", 400)
    if answers > limits.answers:
        raise EngineError(f"n = {answers}: this server gives {limits.answers} answers at most.", 400)
    if len(ids) + most > limits.context:
        raise EngineError(
            f"The prompt has {len(ids)} tokens; with max_tokens = {most} that is more than the {limits.context} that "
            "prompt and answer may have together. Shorten the prompt, or lower max_tokens.",
            400,
        )
    expert = service.catalog.expert(asked.model, key)
    if expert is not None and asked.abstain:
        raise EngineError(f"abstain = true, but the model {asked.model!r} pins an expert. Pass one.", 400)
    allowed = service.catalog.allowed(key)
    return Ask(ids, sampling, expert, allowed, answers, limits.seconds, None if expert is not None else asked.abstain)


def _log(service: Service, request: Request, ask: Ask, answering: Answering) -> None:
    routed, key = answering.routed, request.state.key
    assert routed is not None
    written = sum(answer.count for answer in answering.answers)
    _LOG.info(
        "%s expert=%s decision=%s prompt_tokens=%d written=%d%s",
        request.url.path, routed.expert, routed.decision, len(ask.prompt_ids), written,
        "" if key is None else f" key={key.name}",
    )  # fmt: skip
    if service.log_prompts:
        _LOG.info("prompt ids %s, answers %s", ask.prompt_ids, [answer.text for answer in answering.answers])


def _add_page(app: FastAPI) -> None:
    folder = files("loramix.serving") / "page"
    pages = {
        one.name: (one.read_bytes(), _TYPES[one.name.rpartition(".")[2]])
        for one in folder.iterdir()
        if one.name.rpartition(".")[2] in _TYPES
    }

    @app.get("/", response_class=Response, include_in_schema=False)
    async def page() -> Response:
        content, kind = pages["index.html"]
        return Response(content, media_type=kind)

    @app.get("/page/{name}", response_class=Response, include_in_schema=False)
    async def asset(name: str) -> Response:
        if name not in pages:
            raise HTTPException(404, "No such file.")
        content, kind = pages[name]
        return Response(content, media_type=kind)


def _without_422(app: FastAPI) -> None:
    """Takes FastAPI's own error reply out of the schema: ours is a 400 in OpenAI's shape."""
    original: Callable[[], dict[str, Any]] = app.openapi

    def schema() -> dict[str, Any]:
        found = original()
        for methods in found["paths"].values():
            for operation in methods.values():
                operation["responses"].pop("422", None)
        for name in ("HTTPValidationError", "ValidationError"):
            found.get("components", {}).get("schemas", {}).pop(name, None)
        return found

    app.openapi = schema  # type: ignore[method-assign]
