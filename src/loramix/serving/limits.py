"""How much one request may ask of the server."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """Limits of one server; every one is refused with a message that names it.

    Attributes:
        body_bytes: of a request's body.
        body_seconds: for a body to arrive.
        context: prompt and answer together, in tokens.
        max_tokens: of one answer.
        answers: to one prompt (`n`).
        seconds: from a request to its end.
    """

    context: int
    body_bytes: int = 1 << 20
    body_seconds: float = 10.0
    max_tokens: int = 1024
    answers: int = 4
    seconds: float = 120.0
