"""The frozen linear layer and all its experts as one autograd function over two wide GEMMs.

    c = gates * (x A_cat^T),    y = x W^T + b + s * c B_cat

The expert part is added into the base's own output buffer, forward and backward; kept for the backward pass are x, the
E * R code and the gates, and nothing of width O. The same numbers as `concat` (tests/test_apply.py), with less memory
(benchmarks/step_cost.py).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


def can_fuse(base_layer: object, x: Tensor, A_ERI: Tensor) -> bool:
    """Whether the base layer's product may be computed here: a plain nn.Linear without hooks, in the experts' type,
    outside autocast and torch.compile, on a training pass (without gradients there is nothing to save)."""
    return (
        isinstance(base_layer, nn.Linear)
        and type(base_layer) is nn.Linear
        and type(base_layer.weight) is nn.Parameter  # no quantised or sharded weight, which have products of their own
        and torch.is_grad_enabled()
        and x.dtype == base_layer.weight.dtype == A_ERI.dtype
        and not base_layer.weight.requires_grad
        and (base_layer.bias is None or not base_layer.bias.requires_grad)
        and (x.is_meta or not torch.is_autocast_enabled(x.device.type))  # shapes alone know no autocast
        and not torch.compiler.is_compiling()
        and not (base_layer._forward_hooks or base_layer._forward_pre_hooks)
        and not (base_layer._backward_hooks or base_layer._backward_pre_hooks)
    )


def fused(
    base_layer: nn.Linear,
    x_BTI: Tensor,
    dropped_BTI: Tensor,
    A_ERI: Tensor,
    B_EOR: Tensor,
    gates_NE: Tensor | None,
    scaling: float,
) -> Tensor:
    """Returns base_layer(x) + s * sum_e g_e B_e A_e dropped, (B, T, O).

    Args:
        base_layer: frozen.
        x_BTI: its input.
        dropped_BTI: the experts' input: x itself, or x after the adapter's dropout.
        A_ERI, B_EOR: the stacked experts; one of them may be shared, (1, R, I) or (1, O, R).
        gates_NE: dense weights by token; None for a single expert with weight 1.
        scaling: s.
    """
    shape = x_BTI.shape
    flat_NI = x_BTI.reshape(-1, shape[-1])
    dropped_NI = flat_NI if dropped_BTI is x_BTI else dropped_BTI.reshape(-1, shape[-1])
    out_NO: Tensor = _Fused.apply(  # type: ignore[no-untyped-call]
        flat_NI, dropped_NI, A_ERI, B_EOR, gates_NE, base_layer.weight, base_layer.bias, scaling
    )
    return out_NO.view(*shape[:-1], -1)


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_NI: Tensor,
        dropped_NI: Tensor,
        A_ERI: Tensor,
        B_EOR: Tensor,
        gates_NE: Tensor | None,
        weight_OI: Tensor,
        bias_O: Tensor | None,
        scaling: float,
    ) -> Tensor:
        code_NX = dropped_NI @ A_ERI.flatten(0, 1).T
        gated_NX = gated(code_NX, gates_NE, A_ERI.shape[0], B_EOR.shape[0])
        y_NO = x_NI @ weight_OI.T if bias_O is None else torch.addmm(bias_O, x_NI, weight_OI.T)
        y_NO.addmm_(gated_NX, up(B_EOR), alpha=scaling)
        ctx.same = dropped_NI is x_NI or dropped_NI.data_ptr() == x_NI.data_ptr()
        ctx.save_for_backward(dropped_NI, A_ERI, B_EOR, gates_NE, weight_OI, code_NX)
        ctx.scaling = scaling
        return y_NO

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_NO: Tensor) -> tuple[Tensor | None, ...]:
        dropped_NI, A_ERI, B_EOR, gates_NE, weight_OI, code_NX = ctx.saved_tensors
        down_XI, up_XO = A_ERI.flatten(0, 1), up(B_EOR)
        rank = A_ERI.shape[1]
        back_NX = (grad_NO @ up_XO.T).mul_(ctx.scaling)
        gated_NX = gated(code_NX, gates_NE, A_ERI.shape[0], B_EOR.shape[0])
        grad_up_XO = (gated_NX.T @ grad_NO).mul_(ctx.scaling)
        grad_B = grad_up_XO.view(B_EOR.shape[0], rank, -1).transpose(1, 2)
        grad_gates = None
        if gates_NE is not None:
            back_NER = back_NX.view(len(back_NX), -1, rank)
            code_NER = code_NX.view(len(code_NX), -1, rank)
            if ctx.needs_input_grad[4]:
                grad_gates = (back_NER * code_NER).sum(dim=2)
            back_NX = ungated(back_NX, gates_NE, A_ERI.shape[0], B_EOR.shape[0])
        grad_A = (back_NX.T @ dropped_NI).view(A_ERI.shape) if ctx.needs_input_grad[2] else None
        grad_x = grad_dropped = None
        if ctx.needs_input_grad[0]:
            grad_x = grad_NO @ weight_OI
        if ctx.same and grad_x is not None:
            grad_x.addmm_(back_NX, down_XI)
        elif ctx.needs_input_grad[1]:
            grad_dropped = back_NX @ down_XI
        return grad_x, grad_dropped, grad_A, grad_B, grad_gates, None, None, None


def up(B_EOR: Tensor) -> Tensor:
    """Returns B as one matrix (E * R, O)."""
    return B_EOR.transpose(1, 2).flatten(0, 1)


def add_up(y_NO: Tensor, gated_NX: Tensor, B_EOR: Tensor, scaling: float) -> Tensor:
    """Returns y + s * gated B_cat, (N, O).

    Args:
        y_NO: output of the frozen layer.
        gated_NX: as `gated` returns it.
        B_EOR: the experts' up-projections.
        scaling: s.
    """
    experts, _, rank = B_EOR.shape
    if experts > 1 and len(gated_NX) <= rank:
        # `up` copies all of B. For a few tokens, as in decoding, a product by expert costs less than that.
        by_expert_ENR = gated_NX.view(-1, experts, rank).transpose(0, 1)
        return torch.add(y_NO, torch.bmm(by_expert_ENR, B_EOR.transpose(1, 2)).sum(dim=0), alpha=scaling)
    return torch.addmm(y_NO, gated_NX, up(B_EOR), alpha=scaling)


def gated(code_NX: Tensor, gates_NE: Tensor | None, downs: int, ups: int) -> Tensor:
    """Returns the code that B takes: (N, E * R), or (N, R) where B is shared.

    Args:
        code_NX: x A_cat^T, (N, E * R), or (N, R) where A is shared.
        gates_NE: dense weights; None for a single expert with weight 1.
        downs, ups: how many matrices A and B are stacks of.
    """
    if gates_NE is None:
        return code_NX
    places, experts = gates_NE.shape
    if downs == 1 and experts > 1:
        return (gates_NE[:, :, None] * code_NX[:, None, :]).view(places, -1)
    by_expert_NER = code_NX.view(places, experts, -1)
    if ups == 1 and experts > 1:
        return torch.bmm(gates_NE[:, None, :], by_expert_NER).squeeze(1)
    return (by_expert_NER * gates_NE[:, :, None]).view(places, -1)


def ungated(back_NX: Tensor, gates_NE: Tensor, downs: int, ups: int) -> Tensor:
    """The transpose of `gated`: from the gradient of what B takes to the gradient of the code, (N, E * R) or (N, R).

    Args:
        back_NX: gradient of the gated code.
        gates_NE: dense weights.
        downs, ups: how many matrices A and B are stacks of.
    """
    places, experts = gates_NE.shape
    if downs == 1 and experts > 1:
        return torch.bmm(gates_NE[:, None, :], back_NX.view(places, experts, -1)).squeeze(1)
    if ups == 1 and experts > 1:
        return (gates_NE[:, :, None] * back_NX[:, None, :]).view(places, -1)
    return (back_NX.view(places, experts, -1) * gates_NE[:, :, None]).view(places, -1)
