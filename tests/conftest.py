"""Tests run offline, on one thread: spinning OpenMP threads make two busy processes slower than one."""

import gc
import os
import signal

if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # a job in the background begins so, and its children too
    signal.signal(signal.SIGINT, signal.default_int_handler)
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def pytest_collection_finish() -> None:
    """Everything is imported now. Each training collects garbage, and would look through all of it every time: a third
    of the time of a small one."""
    gc.collect()
    gc.freeze()
