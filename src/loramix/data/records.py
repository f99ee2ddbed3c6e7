"""One example, whatever file it came from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Message:
    """One turn: role is "system", "user", "assistant" or "tool"."""

    role: str
    content: str


@dataclass(frozen=True)
class Record:
    """A conversation with at least one assistant turn to learn, its domain, and where it was read.

    Attributes:
        messages: the turns; prompt and response are the last user and assistant turns of the simple formats.
        domain: its label; None while the file does not say.
        source: "file.jsonl:12", for messages to the user.
        tools: tool descriptions for the chat template, as the file gives them.
        choices: the texts of the options of a multiple-choice question, whose response is the letter of one; else
            empty.
    """

    messages: tuple[Message, ...]
    domain: str | None
    source: str
    tools: tuple[dict[str, Any], ...] = ()
    choices: tuple[str, ...] = ()

    @property
    def prompt(self) -> str:
        """The last user turn before the first response, as text."""
        before = self.messages[: next(i for i, m in enumerate(self.messages) if m.role == "assistant")]
        return next((m.content for m in reversed(before) if m.role == "user"), "")

    @property
    def response(self) -> str:
        """The last assistant turn, as text."""
        return next(m.content for m in reversed(self.messages) if m.role == "assistant")

    @property
    def right(self) -> int | None:
        """The position of the right option, for a multiple-choice question."""
        return ord(self.response) - ord("A") if self.choices else None
