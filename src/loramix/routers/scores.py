"""The scores of a router by token: one narrow product in fp32, whatever the type of the states."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from loramix.precision import HALVES, keeps_types


def token_logits(x_BTI: Tensor, w_EI: Tensor) -> Tensor:
    """Returns the scores of each token in fp32, (N, E).

    Args:
        x_BTI: states, any type.
        w_EI: the router's matrix.
    """
    x_NI = x_BTI.reshape(-1, x_BTI.shape[-1])
    if x_NI.dtype in HALVES and not torch.compiler.is_compiling():
        logits_NE: Tensor = _Scores.apply(x_NI, w_EI)  # type: ignore[no-untyped-call]
        return logits_NE
    return F.linear(x_NI.float(), w_EI.float())


class _Scores(torch.autograd.Function):
    """Keeps the states as they are, not their copy in fp32: with a router in every module such copies were the larger
    half of what a step kept."""

    @staticmethod
    def forward(ctx: Any, x_NI: Tensor, w_EI: Tensor) -> Tensor:
        ctx.save_for_backward(x_NI, w_EI)
        return F.linear(x_NI.float(), w_EI.float())

    @staticmethod
    @once_differentiable
    @keeps_types
    def backward(ctx: Any, grad_NE: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x_NI, w_EI = ctx.saved_tensors
        grad_x = (grad_NE @ w_EI.float()).to(x_NI.dtype) if ctx.needs_input_grad[0] else None
        grad_w = (grad_NE.T @ x_NI.float()).to(w_EI.dtype) if ctx.needs_input_grad[1] else None
        return grad_x, grad_w
