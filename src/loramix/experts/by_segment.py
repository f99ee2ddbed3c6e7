"""Experts of whole rows that lie one after the other in one long row: each row's tokens through its own experts.

What `per_sequence` does for a padded batch, without the padding: cost K * R for every token, whatever E is. Where the
frozen layer may be multiplied here (`fused.can_fuse`), the experts' part is added into its output buffer.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from loramix.routing import Routing

Row = tuple[slice, int, int]
"""A row's tokens, and the places of its A and B in the stacks."""


def by_segment(y_1NO: Tensor, x_1NI: Tensor, A_ERI: Tensor, B_EOR: Tensor, routing: Routing, scaling: float) -> Tensor:
    """Apply by rows; a sequence routing with segments. Arguments and result as in `experts.apply`, B = 1 and T = N."""
    y_NO = y_1NO[0]
    for weights_N, rows in _choices(routing, x_1NI, A_ERI, B_EOR):
        y_NO = _BySegment.apply(  # type: ignore[no-untyped-call]
            y_NO, x_1NI[0], x_1NI[0], A_ERI, B_EOR, weights_N, None, None, rows, scaling
        )
    return y_NO[None]


def fused_by_segment(
    base_layer: nn.Linear,
    x_1NI: Tensor,
    dropped_1NI: Tensor,
    A_ERI: Tensor,
    B_EOR: Tensor,
    routing: Routing,
    scaling: float,
) -> Tensor:
    """Returns base_layer(x) + s * sum_k w_k B_{e_k} A_{e_k} dropped, (1, N, O); arguments as of `fused.fused`."""
    x_NI = x_1NI[0]
    dropped_NI = x_NI if dropped_1NI is x_1NI else dropped_1NI[0]
    y_NO: Tensor | None = None
    weight_OI: Tensor | None = base_layer.weight
    bias_O: Tensor | None = base_layer.bias
    for weights_N, rows in _choices(routing, x_1NI, A_ERI, B_EOR):
        y_NO = _BySegment.apply(  # type: ignore[no-untyped-call]
            y_NO, x_NI, dropped_NI, A_ERI, B_EOR, weights_N, weight_OI, bias_O, rows, scaling
        )
        x_NI, weight_OI, bias_O = dropped_NI, None, None
    assert y_NO is not None
    return y_NO[None]


def _choices(routing: Routing, x_1NI: Tensor, A_ERI: Tensor, B_EOR: Tensor) -> list[tuple[Tensor, list[Row]]]:
    """Returns, for each of the K choices, its weight at each token, (N,), and its rows."""
    segments = routing.segments
    assert segments is not None
    weights_NK = segments.spread(routing.weights.to(x_1NI.dtype))
    return [
        (
            weights_NK[:, k],
            [
                (slice(start, end), expert % len(A_ERI), expert % len(B_EOR))
                for (start, end), expert in zip(segments.spans, experts, strict=True)
            ],
        )
        for k, experts in enumerate(routing.id_lists())
    ]


class _BySegment(torch.autograd.Function):
    """y + s * w B_e A_e dropped for the tokens of each row with its expert e. y is given, or x W^T + b made here."""

    @staticmethod
    def forward(
        ctx: Any,
        y_NO: Tensor | None,
        x_NI: Tensor,
        dropped_NI: Tensor,
        A_ERI: Tensor,
        B_EOR: Tensor,
        weights_N: Tensor,
        weight_OI: Tensor | None,
        bias_O: Tensor | None,
        rows: list[Row],
        scaling: float,
    ) -> Tensor:
        code_NR = dropped_NI.new_empty(len(dropped_NI), A_ERI.shape[1])
        for part, down, _ in rows:
            torch.mm(dropped_NI[part], A_ERI[down].T, out=code_NR[part])
        weighted_NR = code_NR * weights_N[:, None]
        if weight_OI is None:
            assert y_NO is not None
            out_NO = y_NO.clone()
        else:
            out_NO = x_NI @ weight_OI.T if bias_O is None else torch.addmm(bias_O, x_NI, weight_OI.T)
        for part, _, up in rows:
            out_NO[part].addmm_(weighted_NR[part], B_EOR[up].T, alpha=scaling)
        ctx.same = dropped_NI is x_NI or dropped_NI.data_ptr() == x_NI.data_ptr()
        ctx.save_for_backward(dropped_NI, A_ERI, B_EOR, weights_N, weight_OI, code_NR)
        ctx.rows, ctx.scaling = rows, scaling
        return out_NO

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_NO: Tensor) -> tuple[Tensor | None, ...]:
        dropped_NI, A_ERI, B_EOR, weights_N, weight_OI, code_NR = ctx.saved_tensors
        weighted_NR, back_NR = code_NR * weights_N[:, None], torch.empty_like(code_NR)
        grad_A, grad_B = torch.zeros_like(A_ERI), torch.zeros_like(B_EOR)
        for part, _, up in ctx.rows:
            grad_B[up].addmm_(grad_NO[part].T, weighted_NR[part], alpha=ctx.scaling)
            torch.mm(grad_NO[part], B_EOR[up], out=back_NR[part])
        back_NR.mul_(ctx.scaling)
        grad_weights_N = (back_NR * code_NR).sum(dim=1) if ctx.needs_input_grad[5] else None
        back_NR.mul_(weights_N[:, None])
        fused = weight_OI is not None
        grad_x = grad_NO @ weight_OI if fused and ctx.needs_input_grad[1] else None
        shared = ctx.same and grad_x is not None  # x and what the experts read are one: one gradient takes both
        grad_dropped = grad_x if shared else torch.zeros_like(dropped_NI) if ctx.needs_input_grad[2] else None
        for part, down, _ in ctx.rows:
            grad_A[down].addmm_(back_NR[part].T, dropped_NI[part])
            if grad_dropped is not None:
                grad_dropped[part].addmm_(back_NR[part], A_ERI[down])
        grads = grad_x, None if shared else grad_dropped, grad_A, grad_B, grad_weights_N
        return None if fused else grad_NO, *grads, None, None, None, None
