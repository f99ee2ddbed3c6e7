"""Clocks and memory of one training loop, whoever runs it: from its first step to its last."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

from step_cost import Resident
from transformers import TrainerCallback


@dataclass
class Loop:
    """Clocks and memory of one training loop."""

    resident: Resident
    cpu_s: float = 0.0
    wall_s: float = 0.0
    peak_mib: list[float] = field(default_factory=list)

    def begin(self) -> None:
        self.resident.start()
        self.cpu_s, self.wall_s = time.process_time(), time.monotonic()

    def end(self) -> None:
        self.cpu_s, self.wall_s = time.process_time() - self.cpu_s, time.monotonic() - self.wall_s
        self.peak_mib = self.resident.above()


class Watch(TrainerCallback):
    """Starts and stops the clocks with the loop."""

    def __init__(self, loop: Loop) -> None:
        self.loop = loop

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.loop.begin()

    def on_train_end(self, *_: Any, **__: Any) -> None:
        self.loop.end()
