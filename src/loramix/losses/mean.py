"""The mean over routers or modules, which every loss on a forward's record ends with."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


def mean_of(losses: Iterable[Tensor], missing: str) -> Tensor:
    """Returns the mean of scalars.

    Args:
        losses: one for each router or module.
        missing: what to say if there is none.

    Raises:
        ValueError: there is none.
    """
    collected = list(losses)
    if not collected:
        raise ValueError(missing)
    return torch.stack(collected).mean()
