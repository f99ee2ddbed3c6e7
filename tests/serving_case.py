"""A server of a tiny mixture, in the process of the test: its app, its engine, or a real uvicorn on a free port."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import uvicorn
from peft import get_peft_model

from loramix import LoramixConfig
from loramix.methods import method_named
from loramix.serving.app import Service, create_app
from loramix.serving.ask import Ask, Ended, Event, Piece, Routed
from loramix.serving.catalog import Catalog
from loramix.serving.guard import Guard
from loramix.serving.keys import Keys
from loramix.serving.limits import Limits
from loramix.serving.metrics import Metrics
from loramix.serving.model import ServedModel
from loramix.serving.prompts import PromptEncoder
from loramix.serving.sampling import Sampling
from loramix.serving.shapes import TokenTexts
from loramix.serving.transformers_engine import TransformersEngine
from tests import tiny

GREEDY = Sampling(16, temperature=0.0, ignore_end=True)


def lively(model: Any, std: float = 0.4) -> Any:
    """Experts and routers that differ enough for other experts to give other answers."""
    torch.manual_seed(5)
    for name, parameter in model.named_parameters():
        if "loramix" in name:
            parameter.data.normal_(std=std)
    return model


def mixture(method: str = "moa", base: Any = None, **settings: Any) -> Any:
    base = tiny.llama(vocab=len(tiny.tokenizer())) if base is None else base
    given = {"experts": tiny.EXPERTS} if method == "moa" else {}
    config = LoramixConfig(method=method, r=4, init_lora_weights=False, **{**given, **settings})
    return lively(get_peft_model(base, config).eval())


def served(method: str = "moa", *, model: Any = None, decision: str | None = None, **settings: Any) -> ServedModel:
    model = mixture(method, **settings) if model is None else model
    return ServedModel(model, tiny.tokenizer(), method_named(method), decision=decision)


@dataclass
class Got:
    """Everything an engine said of one request."""

    routed: Routed | None
    tokens: list[list[int]]
    texts: list[str]
    reasons: list[str]


async def ask_for(engine: Any, ask: Ask) -> Got:
    """Returns all that an engine says, and checks the order it says it in."""
    got = Got(None, [[] for _ in range(ask.answers)], [""] * ask.answers, [""] * ask.answers)
    async for event in engine.answer(ask):
        _take(got, event)
    return got


def _take(got: Got, event: Event) -> None:
    if isinstance(event, Routed):
        assert got.routed is None
        got.routed = event
    elif isinstance(event, Piece):
        assert got.routed is not None
        assert not got.reasons[event.answer]
        got.tokens[event.answer] += [one.token for one in event.tokens]
        got.texts[event.answer] += event.text
    elif isinstance(event, Ended):
        got.reasons[event.answer] = event.reason


def answers(model: ServedModel, asks: Sequence[Ask], *, places: int = 6, apart: float = 0.0) -> list[Got]:
    """Returns what an engine says of requests that come one after the other, `apart` seconds each."""

    async def run() -> list[Got]:
        engine = TransformersEngine(model, places=places, queue=len(asks))
        await engine.start()

        async def one(number: int) -> Got:
            await asyncio.sleep(number * apart)
            return await ask_for(engine, asks[number])

        try:
            return await asyncio.gather(*map(one, range(len(asks))))
        finally:
            await engine.stop()
            assert engine.queue == (0, 0)

    return asyncio.run(run())


def idle(engine: Any, seconds: float = 20.0) -> bool:
    """Whether nothing is written and nothing waits, within so long: a reply may be read before its place is cleared,
    and a request that its client has left may still be handed over. So it must stay so for a moment."""
    deadline, quiet = time.monotonic() + seconds, 0
    while quiet < 5 and time.monotonic() < deadline:
        quiet = quiet + 1 if engine.queue == (0, 0) else 0
        time.sleep(0.01)
    return quiet >= 5


def app_of(
    model: ServedModel | None = None, *, keys: Keys | None = None, places: int = 8, queue: int = 16, **limits: Any
) -> tuple[Guard, TransformersEngine]:
    """Returns the app of a tiny mixture and its engine."""
    model = served() if model is None else model
    engine = TransformersEngine(model, places=places, queue=queue)
    tokenizer = model.tokenizer
    service = Service(
        catalog=Catalog("demo", model.experts, has_base=model.has_base),
        engine=engine,
        encoder=PromptEncoder(tokenizer),
        texts=TokenTexts(tokenizer),
        limits=Limits(**{"context": model.most_tokens, **limits}),
        metrics=Metrics(lambda: engine.queue),
        vocabulary=len(tokenizer),
    )
    keys = Keys() if keys is None else keys
    return create_app(service, keys, any_host=bool(keys)), engine


@contextmanager
def running(app: Any) -> Iterator[str]:
    """Runs an app in a thread of this process; yields its address."""
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error", timeout_graceful_shutdown=2))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    deadline = time.monotonic() + 60
    while not server.started:
        assert thread.is_alive(), "the server did not start"
        assert time.monotonic() < deadline, "the server took too long"
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(timeout=30)
