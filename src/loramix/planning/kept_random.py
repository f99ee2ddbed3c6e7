"""Random numbers that go on as if nothing had been."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


@contextmanager
def kept_random() -> Iterator[None]:
    """Puts random numbers back to where they were; models are begun with them, and a trainer begins them
    anew."""
    before, arrays = random.getstate(), np.random.get_state()
    devices = [torch.accelerator.current_device_index()] if torch.cuda.is_available() else []
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        random.setstate(before)
        np.random.set_state(arrays)
