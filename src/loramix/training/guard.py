"""Watches each step's loss and gradient: a step that makes no sense is not taken, several in a row are undone."""

from __future__ import annotations

import math
from collections import deque
from pathlib import Path
from statistics import median
from typing import Any

from loramix.errors import Diverged

PATIENCE = 3
"""Steps in a row that may be left out before the training goes back to its last checkpoint, and after that, ends."""
WINDOW = 20
ABOVE_CHANCE = 1.0
SPIKE = 2.0


class StepGuard:
    """Judges steps, by numbers of the step alone and of those before it.

    A step makes no sense if its loss or the norm of its gradient is not finite, or if the loss has jumped: to more than
    SPIKE times the median of the last WINDOW good steps, and to ABOVE_CHANCE nats more than a uniform guess costs
    (log of the vocabulary), so that noise of small batches is never taken for a jump.

    Args:
        vocabulary: tokens the model chooses among.
    """

    def __init__(self, vocabulary: int) -> None:
        self.limit = math.log(max(2, vocabulary)) + ABOVE_CHANCE
        self._recent: deque[float] = deque(maxlen=WINDOW)
        self.left_out = 0
        """Steps left out since the last good one."""
        self.went_back = 0
        """How often the training went back to a checkpoint."""

    def judge(self, loss: float, norm: float) -> str | None:
        """Returns why a step is not to be taken, or None.

        Args:
            loss: negative log-likelihood per supervised token of the step, in nats.
            norm: of the gradient.
        """
        why = None
        if not math.isfinite(loss):
            why = f"its loss is {loss}"
        elif not math.isfinite(norm):
            why = f"the norm of its gradient is {norm}"
        elif self._recent and loss > max(self.limit, SPIKE * (usual := median(self._recent))):
            why = f"its loss jumped from {usual:.2f} to {loss:.2f}"
        if why is None:
            self._recent.append(loss)
            self.left_out = 0
        else:
            self.left_out += 1
        return why

    @property
    def out_of_patience(self) -> bool:
        return self.left_out >= PATIENCE

    def back(self) -> None:
        """Takes note that the training went back; patience begins anew."""
        self.went_back += 1
        self.left_out = 0

    def state(self) -> dict[str, Any]:
        """Returns all of it as JSON."""
        return {"recent": list(self._recent), "left_out": self.left_out, "went_back": self.went_back}

    def set_state(self, state: dict[str, Any]) -> None:
        """Puts back what `state` returned."""
        self._recent.extend(state["recent"])
        self.left_out, self.went_back = state["left_out"], state["went_back"]


def divergence(guard: StepGuard, which: str, rates: tuple[float, float], folder: Path | None) -> Diverged:
    """Returns what is said when nothing helps.

    Args:
        guard: its count of steps left out.
        which: these steps are.
        rates: learning rates, of experts and routers.
        folder: with a checkpoint to go on from under other settings, if there is one.
    """
    also = ", also after going back to a checkpoint" * bool(guard.went_back)
    rest = f" --resume --force with other settings goes on from the last checkpoint in {folder}." if folder else ""
    return Diverged(
        f"the training diverged: {guard.left_out} steps in a row made no sense, {which}{also}. Lower learning_rate "
        f"(now {rates[0]:g}; routers {rates[1]:g}) or look at the data of these steps.{rest}"
    )
