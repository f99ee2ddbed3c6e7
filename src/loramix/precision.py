"""Types of products that a part settles by itself, whatever autocast would make of them.

Shapes alone (the meta device) go by a processor's autocast.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

HALVES = (torch.bfloat16, torch.float16)

Backward = TypeVar("Backward", bound=Callable[..., Any])


def autocast_type(like: Tensor) -> torch.dtype | None:
    """Returns the type that autocast gives products on a tensor's device; None where it is off."""
    kind = _device(like)
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None


def without_autocast(like: Tensor) -> torch.autocast:
    """Returns a context in which operations on a tensor's device keep the types of what they are given."""
    return torch.autocast(_device(like), enabled=False)


def keeps_types(backward: Backward) -> Backward:
    """Lets an autograd function's `backward` keep the types of what it is given, whoever calls it under autocast."""

    @wraps(backward)
    def kept(ctx: Any, *grads: Tensor) -> Any:
        with without_autocast(grads[0]):
            return backward(ctx, *grads)

    return cast(Backward, kept)


def _device(like: Tensor) -> str:
    return "cpu" if like.is_meta else like.device.type
