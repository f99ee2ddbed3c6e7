"""Which frozen modules a bank can be put on, and their sizes."""

from __future__ import annotations

from torch import nn
from transformers.pytorch_utils import Conv1D


def linear_sizes(module: nn.Module) -> tuple[int, int] | None:
    """Returns (in features, out features) of a linear layer, or None if it is none.

    GPT-2's `Conv1D` is a linear layer whose weight is stored transposed; the bank does not see the difference, since it
    only adds to the output. Quantised layers (bitsandbytes, GGUF) name their sizes as nn.Linear does.
    """
    if isinstance(module, Conv1D):
        in_features, out_features = module.weight.shape
        return int(in_features), int(out_features)
    sizes = getattr(module, "in_features", None), getattr(module, "out_features", None)
    if isinstance(sizes[0], int) and isinstance(sizes[1], int):
        return sizes[0], sizes[1]
    return None
