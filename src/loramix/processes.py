"""Several processes that train together (torchrun, accelerate launch): all compute, the first alone writes."""

from __future__ import annotations

import os


def count() -> int:
    """Returns how many processes were started together."""
    return int(os.environ.get("WORLD_SIZE", "1")) if "RANK" in os.environ else 1


def several() -> bool:
    """Returns whether this process was started as one of several."""
    return count() > 1


def place() -> int:
    """Returns this process's number among those started together on its machine."""
    return int(os.environ.get("LOCAL_RANK", "0")) if several() else 0


def writes() -> bool:
    """Returns whether this process writes the run's files and says how it goes: the first, or the only one."""
    return not several() or int(os.environ["RANK"]) == 0


def meet() -> None:
    """Waits for all processes: what one wrote before, all can read after, and what all read before, one can change."""
    if several():
        import torch
        from accelerate import PartialState

        PartialState(cpu=not torch.accelerator.is_available()).wait_for_everyone()
