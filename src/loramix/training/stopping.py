"""SIGINT and SIGTERM while a stage trains: the step is finished and saved; a second signal leaves at once."""

from __future__ import annotations

import os
import signal
import sys
import threading
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from loramix.errors import Interrupted


class StopAtStepEnd(TrainerCallback):
    """Catches the signals inside its `with`, and stops the training after the step they fell into.

    Attributes:
        received: the first signal that came, or None.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopAtStepEnd:
        if threading.current_thread() is threading.main_thread():  # nothing else may catch signals
            for number in (signal.SIGINT, signal.SIGTERM):
                if signal.getsignal(number) is not signal.SIG_IGN:  # as of a job in the background: stays so
                    self._before[number] = signal.signal(number, self._came)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _came(self, number: int, _: FrameType | None) -> None:
        if self.received is not None:
            os._exit(128 + number)  # files are written beside their places, so nothing is left half
        self.received = number
        print("stopping after this step ... (again: at once)", file=sys.stderr, flush=True)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self._anywhere():
            control.should_save = True
            control.should_training_stop = True

    def _anywhere(self) -> bool:
        """Whether a signal came to this process or to one it trains with: all have to stop after the same step."""
        came = self.received or 0
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            device = torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else None
            everywhere = torch.tensor(came, device=device)
            dist.all_reduce(everywhere, op=dist.ReduceOp.MAX)
            self.received = came = int(everywhere) or None  # type: ignore[assignment]
        return bool(came)

    def raise_if_stopped(self, title: str, step: int, steps: int, saved: bool) -> None:
        """Raises an Interrupted if a signal came before the last step."""
        if self.received is None or step >= steps:
            return
        rest = "The same command with --resume goes on (compare: the same command)." if saved else "Nothing was kept."
        raise Interrupted(f"{title}: stopped after step {step} of {steps}. {rest}", self.received)
