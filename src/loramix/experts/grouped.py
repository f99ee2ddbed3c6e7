"""Experts applied to their own tokens only: sort by expert once, one grouped GEMM each for A and B.

The cost does not grow with E, which pays from about E * R = 200 on (docs/decisions/0004-apply-backends.md). The
sorted copies of the tokens are not kept for the backward pass but gathered again there.

Limits of `torch.nn.functional.grouped_mm` (torch 2.13): no fp64, rows of 16 bytes; `fits` knows.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from loramix.experts.fused import product_types
from loramix.precision import keeps_types, without_autocast
from loramix.routing import ExpertOrder, Routing


def fits(rank: int, inputs: int, outputs: int, dtype: torch.dtype) -> bool:
    """Whether grouped_mm takes these sizes: every row a multiple of 16 bytes, and a type it knows."""
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return False
    step = rank_step(dtype)
    return rank % step == 0 and inputs % step == 0 and outputs % step == 0


def rank_step(dtype: torch.dtype) -> int:
    """Returns what a rank must be a multiple of."""
    return 4 if dtype == torch.float32 else 8


def grouped(y_BTO: Tensor, x_BTI: Tensor, A_ERI: Tensor, B_EOR: Tensor, routing: Routing, scaling: float) -> Tensor:
    """Apply by grouped GEMMs; a token routing. Arguments and result as in `experts.apply`.

    Autocast knows nothing of grouped_mm, so its type is told: products are in it where it is on.
    """
    out, inputs = y_BTO.shape[-1], x_BTI.shape[-1]
    routing = routing.by_token()
    order = routing.order(max(A_ERI.shape[0], B_EOR.shape[0]))
    weights_M = routing.weights.to(x_BTI.dtype).flatten()[order.sorted_M]
    low = product_types(x_BTI, A_ERI).experts
    with without_autocast(x_BTI):
        added_NO: Tensor = _Grouped.apply(  # type: ignore[no-untyped-call]
            y_BTO.reshape(-1, out), x_BTI.reshape(-1, inputs), A_ERI, B_EOR, weights_M, order, scaling, low
        )
    return added_NO.view(y_BTO.shape)


class _Grouped(torch.autograd.Function):
    """y_NO + s * sum over a token's choices of w * B_e A_e x; A or B may be one shared matrix."""

    @staticmethod
    def forward(
        ctx: Any,
        y_NO: Tensor,
        x_NI: Tensor,
        A_ERI: Tensor,
        B_EOR: Tensor,
        weights_M: Tensor,
        order: ExpertOrder,
        scaling: float,
        low: torch.dtype,
    ) -> Tensor:
        given = x_NI, A_ERI, B_EOR, weights_M
        x_NI, A_ERI, B_EOR, weights_M = (one.to(low) for one in given)
        if A_ERI.shape[0] == 1:
            code_MR = (x_NI @ A_ERI[0].T)[order.places_M]
        else:
            code_MR = F.grouped_mm(x_NI[order.places_M], A_ERI.transpose(1, 2), offs=order.ends_E)
        weighted_MR = code_MR * (weights_M[:, None] * scaling)
        if B_EOR.shape[0] == 1:
            delta_NO = _gathered(weighted_MR, order, y_NO.shape[0]) @ B_EOR[0].T
        else:
            delta_NO = _gathered(
                F.grouped_mm(weighted_MR, B_EOR.transpose(1, 2), offs=order.ends_E), order, y_NO.shape[0]
            )
        ctx.save_for_backward(*given, code_MR)
        ctx.order, ctx.scaling, ctx.low = order, scaling, low
        return delta_NO.add_(y_NO).to(y_NO.dtype)

    @staticmethod
    @once_differentiable
    @keeps_types
    def backward(ctx: Any, grad_NO: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors  # asked for once: activation checkpointing gives them once
        x_NI, A_ERI, B_EOR, weights_M, code_MR = (one.to(ctx.low) for one in saved)
        order, scaling = ctx.order, ctx.scaling
        given_NO, grad_NO = grad_NO, grad_NO.contiguous().to(ctx.low)
        scale_M1 = weights_M[:, None] * scaling
        weighted_MR = code_MR * scale_M1
        if B_EOR.shape[0] == 1:
            summed_NR = _gathered(weighted_MR, order, len(x_NI))
            grad_B = (grad_NO.T @ summed_NR)[None]
            back_MR = (grad_NO @ B_EOR[0])[order.places_M]
        else:
            grad_MO = grad_NO[order.places_M]
            grad_B = F.grouped_mm(grad_MO.T, weighted_MR, offs=order.ends_E)
            back_MR = F.grouped_mm(grad_MO, B_EOR, offs=order.ends_E)
        grad_weights_M = (back_MR * code_MR).sum(dim=1) * scaling
        back_MR = back_MR * scale_M1
        if A_ERI.shape[0] == 1:
            summed_NR = _gathered(back_MR, order, len(x_NI))
            grad_A = (summed_NR.T @ x_NI)[None]
            grad_x = summed_NR @ A_ERI[0]
        else:
            grad_A = F.grouped_mm(back_MR.T, x_NI[order.places_M], offs=order.ends_E)
            grad_x = _gathered(F.grouped_mm(back_MR, A_ERI, offs=order.ends_E), order, len(x_NI))
        found = zip((grad_x, grad_A, grad_B, grad_weights_M), [one.dtype for one in saved[:4]], strict=True)
        return given_NO, *(grad.to(kind) for grad, kind in found), None, None, None


def _gathered(sorted_MX: Tensor, order: ExpertOrder, places: int) -> Tensor:
    """Returns the sum over each place's choices, (N, X), in a fixed order: the same bits every time."""
    return sorted_MX[order.inverse_M].view(places, -1, sorted_MX.shape[1]).sum(dim=1)
