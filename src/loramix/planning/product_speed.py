"""A rough guess of time where no steps can be measured: FLOPs over the speed of one product, times a constant."""

from __future__ import annotations

import time
from typing import Any

import torch

from loramix.models import load_skeleton
from loramix.settings import Experiment

EFFICIENCY = 0.71
"""Share of the product's speed that steps of the built-in base reached on one machine; on others it was 0.45 to 0.7."""


def gemm_rate(experiment: Experiment) -> float:
    """Returns FLOP/s of a product of the base's size, measured now on the device that would train, within a second."""
    config: Any = load_skeleton(experiment.model_name_or_path).config.get_text_config()
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    dtype = getattr(torch, experiment.dtype)
    x = torch.randn(1024, config.hidden_size, dtype=dtype, device=device)
    weight = torch.randn(config.intermediate_size, config.hidden_size, dtype=dtype, device=device)
    best, begun = 0.0, time.monotonic()
    while time.monotonic() - begun < 0.5:
        start = time.perf_counter()
        float((x @ weight.T)[0, 0])  # waits for the device
        best = max(best, 2 * x.numel() * len(weight) / (time.perf_counter() - start))
    return best
