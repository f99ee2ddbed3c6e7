"""Strict loading: a tensor that is missing, unused or of another shape is an error, never a warning.

PEFT loads with strict=False and transformers prints a report; both leave a router that is missing from the file at
random. A mixture with a random router answers, wrongly.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from loramix.errors import ModelError, Problems
from loramix.tuner.registration import PREFIX


def check_tensors(wanted: Mapping[str, Tensor], found: Mapping[str, Tensor], where: str) -> None:
    """Checks that `found` holds exactly the wanted tensors, in their shapes, without NaN or infinity.

    Raises:
        ModelError: with every difference.
    """
    problems = Problems(where)
    for name, tensor in wanted.items():
        if name not in found:
            problems.add(
                f"{name} is missing. Expected shape {tuple(tensor.shape)}. The file is incomplete: get it anew."
            )
        elif found[name].shape != tensor.shape:
            problems.add(
                f"{name} has shape {tuple(found[name].shape)}, expected {tuple(tensor.shape)}. The adapter was made "
                "for another base, rank or number of experts."
            )
        elif not torch.isfinite(found[name]).all():
            problems.add(f"{name} holds NaN or infinity. The training that wrote it diverged: use an earlier one.")
    for name in found:
        if name not in wanted:
            problems.add(f"{name} is not used by this adapter. The file does not belong to its adapter_config.json.")
    problems.raise_as(ModelError)


class TransformersLoad:
    """Stands in for a model's `_load_pretrained_model`, which transformers' `load_adapter` calls, and refuses what it
    only reports."""

    replaces = "_load_pretrained_model"

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def install(self) -> None:
        if hasattr(type(self.model), self.replaces):
            setattr(self.model, self.replaces, self)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        info, rest = type(self.model)._load_pretrained_model(*args, **kwargs)  # type: ignore[attr-defined]
        problems = Problems("the adapter's file")
        for name in sorted(info.missing_keys):
            if PREFIX in name:
                problems.add(f"{name} is missing. The file is incomplete: get it anew.")
        for name in sorted(info.unexpected_keys):
            problems.add(f"{name} is not used by this adapter. The file does not belong to its adapter_config.json.")
        for mismatch in info.mismatched_keys:
            problems.add(f"{mismatch[0]} has shape {tuple(mismatch[1])}, expected {tuple(mismatch[2])}.")
        for name, tensor in chain(self.model.named_parameters(), self.model.named_buffers()):
            if PREFIX in name and not tensor.is_meta and not torch.isfinite(tensor).all():
                problems.add(f"{name} holds NaN or infinity. The training that wrote it diverged: use an earlier one.")
        problems.raise_as(ModelError)
        return info, rest
