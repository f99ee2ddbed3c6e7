"""What an engine is asked for, and what it answers with, piece by piece."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Protocol

from loramix.serving.sampling import Chosen, Sampling


@dataclass(frozen=True)
class Ask:
    """One request.

    Attributes:
        prompt_ids: token ids of the prompt.
        sampling: how tokens are chosen.
        expert: the expert to pin, "base" for the base, None to route.
        allowed: the experts that may answer, "base" among them if the base may; None for all.
        answers: how many, each drawn on its own.
        seconds: how long it may take.
        abstain: whether the base may answer a prompt unlike all domains; as calibrated by default.
    """

    prompt_ids: tuple[int, ...]
    sampling: Sampling
    expert: str | None = None
    allowed: frozenset[str] | None = None
    answers: int = 1
    seconds: float = 120.0
    abstain: bool | None = None


@dataclass(frozen=True)
class Routed:
    """Which expert answers; the first thing an engine says.

    Attributes:
        expert: its name, "base", or None for a model that mixes experts token by token.
        decision: how it was settled: a decision word, "pinned", "told" (the domain was named) or "token".
        probabilities: by expert, what the decision compared; empty where nothing was.
        score, threshold: how far the prompt is from all domains, and from where on the base answers, if calibrated.
    """

    expert: str | None
    decision: str
    probabilities: dict[str, float]
    score: float | None = None
    threshold: float | None = None

    @property
    def probability(self) -> float | None:
        return None if self.expert is None else self.probabilities.get(self.expert)


@dataclass(frozen=True)
class Piece:
    """More of an answer: text that is certain now (it may be empty), and the tokens taken in for it."""

    answer: int
    text: str
    tokens: tuple[Chosen, ...] = ()


@dataclass(frozen=True)
class Ended:
    """The end of one answer: "stop" or "length", and how many tokens it has."""

    answer: int
    reason: str
    tokens: int


Event = Routed | Piece | Ended


class EngineError(Exception):
    """An engine cannot go on with a request. `status` is the HTTP status that says so."""

    def __init__(self, message: str, status: int = 500, *, retry_after: int | None = None) -> None:
        super().__init__(message)
        self.status, self.retry_after = status, retry_after


class Engine(Protocol):
    """Answers requests. Closing the iterator of `answer` gives the request up and frees its place."""

    @property
    def queue(self) -> tuple[int, int]:
        """How many answers are being written, and how many requests wait."""
        ...

    @property
    def alive(self) -> bool: ...

    async def start(self) -> None: ...

    async def stop(self) -> None: ...

    async def route(self, ask: Ask) -> Routed:
        """Returns the routing of a prompt and writes nothing."""
        ...

    def answer(self, ask: Ask) -> AsyncIterator[Event]:
        """Yields the routing, then pieces of all answers as they come, and the end of each.

        Raises:
            EngineError: too many wait, it took too long, or the engine failed.
        """
        ...
