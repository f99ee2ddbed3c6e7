"""One expert's delta added to the weights of a frozen layer, and taken out again."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D


def fold_problem(layer: nn.Module) -> str | None:
    """Returns why nothing can be added to a layer's weights, or None: only plain floats take a delta."""
    if type(layer) not in (nn.Linear, Conv1D):
        return (
            f"is a {type(layer).__name__}. Expected nn.Linear or Conv1D: quantised or otherwise altered weights cannot "
            "take a delta without loss. Load the base without quantisation."
        )
    weight = layer.weight
    assert isinstance(weight, Tensor)
    if weight.dtype not in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        return (
            f"has weights of type {weight.dtype}. Expected float32, bfloat16 or float16. Load the base without "
            "quantisation."
        )
    if weight.is_meta:
        return "has no weights (they are on the meta device). Load the base's weights first."
    return None


def delta(down_RI: Tensor, up_OR: Tensor, scaling: float) -> Tensor:
    """Returns s B A, (O, I), in fp32 or, for experts in fp64, in that: half precision would round twice."""
    kind = torch.float64 if down_RI.dtype == torch.float64 else torch.float32
    return scaling * (up_OR.to(kind) @ down_RI.to(kind))


def summed(layer: nn.Module, delta_OI: Tensor) -> Tensor:
    """Returns the layer's weights with a delta added, in the finer of the two types, and as the layer stores them
    (Conv1D: transposed)."""
    weight = layer.weight
    assert isinstance(weight, Tensor)
    stored = delta_OI.T if isinstance(layer, Conv1D) else delta_OI
    kind = torch.promote_types(weight.dtype, stored.dtype)
    return weight.detach().to(kind) + stored.to(weight.device, kind)


def with_delta(layer: nn.Module, delta_OI: Tensor) -> Tensor:
    """Returns the same, rounded once to the type of the layer's weights."""
    found = summed(layer, delta_OI)
    assert isinstance(layer.weight, Tensor)
    return found.to(layer.weight.dtype)
