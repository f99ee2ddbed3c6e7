"""Tokens to text as they come, and where a stop text ends it."""

from __future__ import annotations

from typing import Any

from tokenizers.decoders import DecodeStream


class TextStream:
    """The text of one answer, handed out as soon as no later token can change it.

    A character of several tokens is held back until it is whole, and what may be the beginning of a stop text until it
    is known not to be one.

    Args:
        tokenizer: a fast tokenizer of transformers.
        stop: texts that end the answer; what follows from the first of them on is not handed out.
    """

    def __init__(self, tokenizer: Any, stop: tuple[str, ...] = ()) -> None:
        self._tokenizer = tokenizer
        self._decoder = DecodeStream(skip_special_tokens=True)
        self._ids: list[int] = []
        self._stop = stop
        self._held = ""
        self._decoded = 0
        self.stopped = False

    def push(self, token: int) -> str:
        """Takes in a token and returns the text that is now certain; sets `stopped` when a stop text came."""
        if self.stopped:
            return ""
        self._ids.append(token)
        fresh = self._decoder.step(self._tokenizer.backend_tokenizer, token) or ""
        self._decoded += len(fresh)
        return self._certain(fresh)

    def finish(self) -> str:
        """Returns what was held back, when no token follows. A broken character at the end is shown as such."""
        if self.stopped:
            return ""
        # The decoder keeps an incomplete character for itself: the whole text has it.
        rest = self._tokenizer.decode(self._ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        text, held = self._certain(rest[self._decoded :]), self._held
        self._held = ""  # empty already where a stop text came
        return text + held

    def _certain(self, fresh: str) -> str:
        text = self._held + fresh
        found = [place for place in (text.find(stop) for stop in self._stop) if place >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        kept = max((_begins(text, stop) for stop in self._stop), default=0)
        self._held = text[len(text) - kept :]
        return text[: len(text) - kept]


def _begins(text: str, stop: str) -> int:
    """Returns how many characters at the end of a text are the beginning of a stop text."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)
