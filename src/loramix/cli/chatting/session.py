"""One chat: prompts are answered in turn, and what was said can be looked at, taken back and asked again."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from loramix.cli.chatting.answering import Answering, Prompt
from loramix.cli.chatting.conversation import Answer, Asked, Conversation, Turn
from loramix.cli.chatting.streaming import ctrl_c_stops
from loramix.cli.chatting.voices import Voice, Voices

_CONTROL = {code: None for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}


class Session:
    """A conversation with a run's model.

    Args:
        answering: answers prompts.
        voices: who can answer.
        conversation: what was said, nothing at first.
        at_terminal: whether somebody sits there: then Ctrl-C stops an answer and not the program, and nothing that a
            model writes can steer the terminal.

    Attributes:
        saved: the file this session was saved to.
        over: whether the user is done.
    """

    def __init__(self, answering: Answering, voices: Voices, conversation: Conversation, *, at_terminal: bool) -> None:
        self.answering, self.voices, self.conversation = answering, voices, conversation
        self.at_terminal = at_terminal
        self.saved: Path | None = None
        self.over = False
        self._told_of_left_out = False

    def ask(self, text: str) -> None:
        """Answers a prompt and keeps both."""
        answer = self._answered(self.conversation.asking(text), self.voices.chosen)
        if answer.cut and not answer.text:
            note("stopped before the first word; the prompt was taken back.")
            return
        self.conversation.turns.append(Turn(text, answer))

    def compare(self, names: list[str]) -> None:
        """Answers the last prompt again by each of some experts; the conversation stays as it is. Ctrl-C ends it."""
        choices = self.voices.compared(names)
        asked = self.conversation.asking_again()
        for choice in choices:
            if self._answered(asked, choice, label=f"[{choice or self.voices.itself}] ").cut:
                return

    def read(self, asked: Asked) -> Prompt:
        """Returns what is sent of a conversation; the first time that turns are left out, says so."""
        prompt = self.answering.read(asked)
        if prompt.left_out and not self._told_of_left_out:
            note(
                "the conversation is longer than the model's context: from here on the oldest turns are left out of "
                "what is sent. /clear begins anew."
            )
            self._told_of_left_out = True
        return prompt

    def start_anew(self) -> None:
        """Forgets all turns."""
        self.conversation.turns.clear()
        self._told_of_left_out = False

    def shown(self, text: str) -> str:
        """Returns a text as it may be written to the screen."""
        return text.translate(_CONTROL) if self.at_terminal else text

    def _answered(self, asked: Asked, choice: str | None, label: str = "") -> Answer:
        """Returns the answer of a choice after showing it; `label` stands before it where it has none of its own."""
        prompt = self.read(asked)
        stream = self.answering.stream(self._say)
        voice: Voice | None = None
        with ctrl_c_stops(self.at_terminal) as stopped:
            try:
                voice = self.voices.voice(prompt.batch, choice)
                self._say(voice.label or label)
                if not stopped():
                    self.answering.answer(prompt, voice, stream, stopped)
            except KeyboardInterrupt:
                if not stopped():
                    raise
            cut = stopped()
        print(" [cut]" if cut else "", flush=True)
        found: dict[str, Any] = {} if voice is None else {"expert": voice.expert, "probability": voice.probability}
        return Answer(stream.text, "" if voice is None else voice.label, **found, cut=cut)

    def _say(self, text: str) -> None:
        print(self.shown(text), end="", flush=True)


def note(text: str) -> None:
    """Says something that is no result."""
    print(text, file=sys.stderr, flush=True)
