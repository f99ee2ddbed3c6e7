"""Autocast where there are shapes alone: torch's own passes over tensors on the meta device."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

PRODUCTS = {
    "addbmm",
    "addmm",
    "baddbmm",
    "bmm",
    "conv1d",
    "einsum",
    "linear",
    "matmul",
    "__matmul__",
    "__rmatmul__",
    "mm",
    "vecdot",
}
"""Functions whose operands torch's autocast turns into its type, by their names in Python; but not in place."""


class ShapesAutocast(TorchFunctionMode):
    """Does to tensors on the meta device what autocast does to those of a processor, wherever that is on.

    Operands of products are cast, as autograd sees it, so that what is kept for the backward has the type it has in a
    true step, and frozen weights of another type are kept a second time. What autocast does beside (few functions in
    fp32, casts of trained weights that are used twice made once) is left out.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__name__", "") in PRODUCTS and "out" not in kwargs and torch.is_autocast_enabled("cpu"):
            args, kwargs = tree_map(_low, (args, kwargs))
        return func(*args, **kwargs)


def _low(one: Any) -> Any:
    if not (isinstance(one, Tensor) and one.is_meta and one.is_floating_point()) or one.dtype == torch.float64:
        return one
    return one.to(torch.get_autocast_dtype("cpu"))
