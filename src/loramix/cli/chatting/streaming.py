"""An answer as it comes: its text, and Ctrl-C, which stops it."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

_BROKEN = "\ufffd"
_MOST_BROKEN = 3
"""A character has four bytes at most; of one that is not whole yet, no more than three can have come."""


class TextStream:
    """The text of one answer, said as it becomes certain: a character of several tokens only when it is whole.

    What `generate` takes as its streamer.
    """

    def __init__(self, tokenizer: Any, say: Callable[[str], None]) -> None:
        self._tokenizer, self._say = tokenizer, say
        self._ids: list[int] = []
        self._said = 0
        self._prompt_came = False
        self.text = ""

    def put(self, tokens: Tensor) -> None:
        """Takes in the prompt, the first time, and then one token after the other."""
        if not self._prompt_came:
            self._prompt_came = True
            return
        self._ids += tokens.flatten().tolist()
        self.text = self._tokenizer.decode(self._ids, skip_special_tokens=True)
        broken = len(self.text) - len(self.text.rstrip(_BROKEN))
        self._say_upto(len(self.text) - min(broken, _MOST_BROKEN))

    def end(self) -> None:
        """Says what was held back."""
        self._say_upto(len(self.text))

    def _say_upto(self, length: int) -> None:
        if length > self._said:
            self._say(self.text[self._said : length])
            self._said = length


@contextmanager
def ctrl_c_stops(catches: bool) -> Iterator[Callable[[], bool]]:
    """Makes Ctrl-C inside a wish to stop, which can be asked for; pressed again, it interrupts at once.

    Args:
        catches: whether to; without it Ctrl-C keeps its meaning, and what is given always says no.
    """
    if not catches or threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    presses: list[int] = []

    def pressed(number: int, _: Any) -> None:
        presses.append(number)
        if len(presses) > 1:
            raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, pressed)
    try:
        yield lambda: bool(presses)
    finally:
        signal.signal(signal.SIGINT, before)


class Stopped:
    """Ends a generation after a token, if that is wished; what `generate` takes as a stopping criterion."""

    def __init__(self, stopped: Callable[[], bool]) -> None:
        self._stopped = stopped

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        return torch.full((len(input_ids),), self._stopped(), dtype=torch.bool, device=input_ids.device)
