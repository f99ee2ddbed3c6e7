"""What was said: turns of prompt and answer, as messages for the model and as a row of data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from loramix.data.records import Message
from loramix.errors import ConfigError


@dataclass(frozen=True)
class Answer:
    """One answer.

    Attributes:
        text: what was said.
        label: what stood before it on the screen, such as "[finance 93%] "; may be empty.
        expert: who gave it, "base" for the base; None where the method settles no expert.
        probability: what the router gave the expert; None where none was asked, or none fits.
        cut: whether it was stopped before its end.
    """

    text: str
    label: str = ""
    expert: str | None = None
    probability: float | None = None
    cut: bool = False


@dataclass(frozen=True)
class Turn:
    """A prompt and its answer."""

    prompt: str
    answer: Answer


@dataclass(frozen=True)
class Asked:
    """A prompt with all that came before it.

    Attributes:
        system: what the model is told before everything else, if anything.
        earlier: the turns before it.
        prompt: the prompt.
    """

    system: str | None
    earlier: tuple[Turn, ...]
    prompt: str

    def messages(self, left_out: int = 0) -> list[Message]:
        """Returns the messages that ask for the answer, without the `left_out` oldest turns."""
        said = [] if self.system is None else [Message("system", self.system)]
        for turn in self.earlier[left_out:]:
            said += [Message("user", turn.prompt), Message("assistant", turn.answer.text)]
        return [*said, Message("user", self.prompt)]


class Conversation:
    """The turns so far.

    Args:
        system: what the model is told before everything else.
    """

    def __init__(self, system: str | None = None) -> None:
        self.system = system
        self.turns: list[Turn] = []

    def asking(self, prompt: str) -> Asked:
        """Returns a new prompt behind all turns."""
        return Asked(self.system, tuple(self.turns), prompt)

    def asking_again(self) -> Asked:
        """Returns the last prompt as it was asked.

        Raises:
            ConfigError: there is none.
        """
        if not self.turns:
            raise ConfigError("nothing was asked yet. Write a prompt first.")
        return Asked(self.system, tuple(self.turns[:-1]), self.turns[-1].prompt)

    def as_row(self) -> dict[str, Any]:
        """Returns the conversation as a row of the form `messages`, which loramix reads as data.

        Each answer says beside its text who gave it (`expert`, `probability`) and whether it was `cut`. Prompts that
        got no text as an answer are left out: there is nothing to learn from them.

        Raises:
            ConfigError: there is no answer.
        """
        rows: list[dict[str, Any]] = []
        for turn in self.turns:
            if turn.answer.text.strip():
                rows += [{"role": "user", "content": turn.prompt}, _answered(turn.answer)]
        if not rows:
            raise ConfigError("no prompt was answered yet, so there is nothing to save.")
        told = [] if self.system is None else [{"role": "system", "content": self.system}]
        return {"messages": [*told, *rows]}


def _answered(answer: Answer) -> dict[str, Any]:
    row: dict[str, Any] = {"role": "assistant", "content": answer.text}
    if answer.expert is not None:
        row["expert"] = answer.expert
    if answer.probability is not None:
        row["probability"] = round(answer.probability, 4)
    return {**row, "cut": True} if answer.cut else row
