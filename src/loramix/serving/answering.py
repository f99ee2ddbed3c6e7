"""From an engine's events to OpenAI's replies, whole or streamed."""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from collections.abc import AsyncGenerator, Callable, Coroutine, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar, cast

from loramix.serving.ask import Ask, Ended, Engine, EngineError, Event, Piece, Routed
from loramix.serving.metrics import Metrics
from loramix.serving.replies import Routing, Usage, error
from loramix.serving.sampling import Chosen


class Shape(Protocol):
    """How one route's replies look: those of chats, or of texts."""

    def whole(self, about: dict[str, Any], answers: Sequence[Answer], usage: Usage, routing: Routing) -> Any: ...

    def first(self, answers: int) -> list[dict[str, Any]]:
        """Returns the choices of a stream's first chunk, before any text."""
        ...

    def delta(self, piece: Piece, offset: int) -> dict[str, Any]: ...

    def last(self, ended: Ended) -> dict[str, Any]: ...

    def stream_object(self) -> str: ...


@dataclass
class Answer:
    """One answer as it is put together."""

    text: str = ""
    tokens: list[Chosen] = field(default_factory=list)
    reason: str = ""
    count: int = 0


class Gone(Exception):
    """Whoever asked has left."""


T = TypeVar("T")


class Answering:
    """One request that is being answered.

    Args:
        engine: answers it.
        ask: what is asked.
        model: the model's name as the client gave it.
        shape: of the replies.
        metrics: counts.
    """

    def __init__(self, engine: Engine, ask: Ask, model: str, shape: Shape, metrics: Metrics) -> None:
        self._ask, self._shape, self._metrics = ask, shape, metrics
        self._started = time.monotonic()
        prefix = "chatcmpl" if "chat" in shape.stream_object() else "cmpl"
        self._about = {"id": f"{prefix}-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}
        self._events = engine.answer(ask)
        self.answers = [Answer() for _ in range(ask.answers)]
        self.routed: Routed | None = None

    async def begin(self, gone: Callable[[], Coroutine[Any, Any, None]]) -> Routed:
        """Waits for the routing, after which the reply's headers can be sent.

        Args:
            gone: returns when the client has left.

        Raises:
            EngineError: the request cannot be answered.
            Gone: the client left.
        """
        self.routed = cast(Routed, await self._unless(gone, anext(self._events)))
        self._metrics.routed(self.routed)
        return self.routed

    async def whole(self, gone: Callable[[], Coroutine[Any, Any, None]]) -> Any:
        """Returns the whole reply, once it is written."""

        async def gather() -> None:
            async for event in self._events:
                self._take(event)

        await self._unless(gone, gather())
        assert self.routed is not None
        return self._shape.whole(self._about, self.answers, self._usage(), Routing.of(self.routed))

    async def stream(self, *, with_usage: bool) -> AsyncGenerator[str]:
        """Yields the reply as server-sent events. Closing it gives the request up."""
        assert self.routed is not None
        async with aclosing(self._events):  # type: ignore[type-var]
            yield self._chunk(self._shape.first(self._ask.answers), routing=Routing.of(self.routed).model_dump())
            try:
                async for event in self._events:
                    before = len(self.answers[event.answer].text) if isinstance(event, Piece) else 0
                    self._take(event)
                    if isinstance(event, Piece) and (event.text or self._ask.sampling.logprobs is not None):
                        yield self._chunk([self._shape.delta(event, before)])
                    elif isinstance(event, Ended):
                        yield self._chunk([self._shape.last(event)])
            except EngineError as failed:
                yield f"data: {json.dumps(error(str(failed), kind='server_error'))}\n\n"
                return
            if with_usage:
                yield self._chunk([], usage=self._usage().model_dump())
            yield "data: [DONE]\n\n"

    async def close(self) -> None:
        """Gives the request up."""
        await self._events.aclose()  # type: ignore[attr-defined]

    def _take(self, event: Event) -> None:
        if isinstance(event, Piece):
            if event.tokens and self._first_of_all():
                self._metrics.first_token(time.monotonic() - self._started)
            answer = self.answers[event.answer]
            answer.text += event.text
            answer.tokens += event.tokens
        elif isinstance(event, Ended):
            answer = self.answers[event.answer]
            answer.reason, answer.count = event.reason, event.tokens
            if all(one.reason for one in self.answers):
                usage, took = self._usage(), time.monotonic() - self._started
                self._metrics.answered(usage.prompt_tokens, usage.completion_tokens, took)

    def _first_of_all(self) -> bool:
        return not any(answer.tokens for answer in self.answers)

    def _usage(self) -> Usage:
        prompt, written = len(self._ask.prompt_ids), sum(answer.count for answer in self.answers)
        return Usage(prompt_tokens=prompt, completion_tokens=written, total_tokens=prompt + written)

    def _chunk(self, choices: list[dict[str, Any]], **more: Any) -> str:
        body = {**self._about, "object": self._shape.stream_object(), "choices": choices, **more}
        return f"data: {json.dumps(body, ensure_ascii=False)}\n\n"

    async def _unless(self, gone: Callable[[], Coroutine[Any, Any, None]], work: Any) -> Any:
        """Returns what some work returns, unless the client leaves first; then the request is given up."""
        working, left = asyncio.ensure_future(work), asyncio.ensure_future(gone())
        try:
            await asyncio.wait({working, left}, return_when=asyncio.FIRST_COMPLETED)
            if working.done():
                return working.result()
            raise Gone
        finally:
            for task in (working, left):
                task.cancel()
            await asyncio.gather(working, left, return_exceptions=True)
