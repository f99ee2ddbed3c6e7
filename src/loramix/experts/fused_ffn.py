"""The two halves of a feed-forward block whose experts are whole blocks, each as one autograd function.

The same numbers as `experts/ffn.py` (tests/test_ffn_experts.py) without its copies: the K copies of the
first half are written where they stay, the weighted copies of the second half are made again in the backward pass
instead of being kept.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from loramix.experts.by_channel import ByChannel, gated, ungated, up
from loramix.experts.dropping import left
from loramix.experts.fused import Types, product_types, through
from loramix.precision import keeps_types, without_autocast
from loramix.routing import Routing


def expand(
    base_layer: nn.Linear,
    x_BTI: Tensor,
    keep_BTI: Tensor | None,
    A_ERI: Tensor,
    B_EFR: Tensor,
    routing: Routing,
    scaling: float,
) -> Tensor:
    """Returns base_layer(x) + s * B_{e_k} A_{e_k} x for each of a token's K experts, (K, B, T, F).

    Args:
        base_layer: frozen.
        x_BTI: its input.
        keep_BTI: which of its numbers the experts see, bool; None for all.
        A_ERI, B_EFR: the stacked experts.
        routing: by token.
        scaling: s, of what is left after dropout.
    """
    masks_KNE, types = _masks(routing, max(len(A_ERI), len(B_EFR)), A_ERI), product_types(x_BTI, A_ERI)
    keep_NI = None if keep_BTI is None else keep_BTI.view(-1, x_BTI.shape[-1])
    with without_autocast(x_BTI):
        out_KNF: Tensor = _Expand.apply(  # type: ignore[no-untyped-call]
            x_BTI.reshape(-1, x_BTI.shape[-1]),
            keep_NI,
            A_ERI,
            B_EFR,
            masks_KNE,
            base_layer.weight,
            base_layer.bias,
            scaling,
            types,
        )
    return out_KNF.view(len(masks_KNE), *x_BTI.shape[:-1], -1)


def contract(
    base_layer: nn.Linear,
    inner_KBTF: Tensor,
    keep_KBTF: Tensor | None,
    A_ERF: Tensor,
    B_EOR: Tensor,
    routing: Routing,
    scaling: float,
) -> Tensor:
    """Returns base_layer(sum_k g_k a_k) + s * sum_k g_k B_{e_k} A_{e_k} a_k, (B, T, O); arguments as of `expand`."""
    masks_KNE, types = _masks(routing, max(len(A_ERF), len(B_EOR)), A_ERF), product_types(inner_KBTF, A_ERF)
    with without_autocast(inner_KBTF):
        out_NO: Tensor = _Contract.apply(  # type: ignore[no-untyped-call]
            inner_KBTF.flatten(1, 2),
            None if keep_KBTF is None else keep_KBTF.flatten(1, 2),
            routing.weights.T,
            A_ERF,
            B_EOR,
            masks_KNE,
            base_layer.weight,
            base_layer.bias,
            scaling,
            types,
        )
    return out_NO.view(*inner_KBTF.shape[1:-1], -1)


def _masks(routing: Routing, num_experts: int, like: Tensor) -> Tensor:
    """Returns 1 where a token's k-th expert is e, (K, N, E)."""
    experts_E = torch.arange(num_experts, device=like.device)
    return (routing.chosen().T[:, :, None] == experts_E).to(like.dtype)


def _linear(x_NI: Tensor, weight_OI: Tensor, bias_O: Tensor | None, kind: torch.dtype) -> Tensor:
    if bias_O is None:
        return x_NI.to(kind) @ weight_OI.to(kind).T
    return torch.addmm(bias_O.to(kind), x_NI.to(kind), weight_OI.to(kind).T)


class _Expand(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_NI: Tensor,
        keep_NI: Tensor | None,
        A_ERI: Tensor,
        B_EFR: Tensor,
        masks_KNE: Tensor,
        weight_FI: Tensor,
        bias_F: Tensor | None,
        scaling: float,
        types: Types,
    ) -> Tensor:
        frozen_NF = _linear(x_NI, weight_FI, bias_F, types.frozen)
        down_XI, up_XF = A_ERI.flatten(0, 1).to(types.experts), up(B_EFR).to(types.experts)
        code_NX = left(x_NI, keep_NI).to(types.experts) @ down_XI.T
        out_KNF = frozen_NF.new_empty(len(masks_KNE), *frozen_NF.shape)
        for out_NF, mask_NE in zip(out_KNF, masks_KNE.to(types.experts), strict=True):
            chosen_NX = gated(code_NX, mask_NE, len(A_ERI), len(B_EFR))
            if types.frozen == types.experts:
                torch.addmm(frozen_NF, chosen_NX, up_XF, alpha=scaling, out=out_NF)
            else:
                out_NF.copy_(torch.addmm(frozen_NF.to(types.experts), chosen_NX, up_XF, alpha=scaling))
        ctx.save_for_backward(x_NI, keep_NI, A_ERI, B_EFR, masks_KNE, weight_FI, code_NX)
        ctx.scaling, ctx.types = scaling, types
        return out_KNF

    @staticmethod
    @once_differentiable
    @keeps_types
    def backward(ctx: Any, grad_KNF: Tensor) -> tuple[Tensor | None, ...]:
        x_NI, keep_NI, A_ERI, B_EFR, masks_KNE, weight_FI, code_NX = ctx.saved_tensors
        types, sizes = ctx.types, (len(A_ERI), len(B_EFR))
        low_ERI, up_XF = A_ERI.to(types.experts), up(B_EFR).to(types.experts)
        grad_up_XF = torch.zeros_like(up_XF)
        back_NX = torch.zeros_like(code_NX)
        for grad_NF, mask_NE in zip(grad_KNF, masks_KNE.to(types.experts), strict=True):
            own_NF = grad_NF.to(types.experts)
            grad_up_XF.addmm_(gated(code_NX, mask_NE, *sizes).T, own_NF, alpha=ctx.scaling)
            back_NX.add_(ungated((own_NF @ up_XF.T).mul_(ctx.scaling), mask_NE, *sizes))
        grad_A = (back_NX.T @ left(x_NI, keep_NI).to(types.experts)).view(A_ERI.shape).to(A_ERI.dtype)
        grad_B = grad_up_XF.view(len(B_EFR), A_ERI.shape[1], -1).transpose(1, 2).to(B_EFR.dtype)
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = grad_KNF.sum(dim=0).to(types.frozen) @ weight_FI.to(types.frozen)
            grad_x = through(ByChannel(), [back_NX], [low_ERI], keep_NI, grad_x).to(x_NI.dtype)
        return grad_x, None, grad_A, grad_B, None, None, None, None, None


class _Contract(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        inner_KNF: Tensor,
        keep_KNF: Tensor | None,
        weights_KN: Tensor,
        A_ERF: Tensor,
        B_EOR: Tensor,
        masks_KNE: Tensor,
        weight_OF: Tensor,
        bias_O: Tensor | None,
        scaling: float,
        types: Types,
    ) -> Tensor:
        down_XF = A_ERF.flatten(0, 1).to(types.experts)
        own_KN = weights_KN.to(inner_KNF.dtype)
        summed_NF = inner_KNF[0] * own_KN[0, :, None]
        for inner_NF, weights_N in zip(inner_KNF[1:], own_KN[1:], strict=True):
            summed_NF.addcmul_(inner_NF, weights_N[:, None])
        y_NO = _linear(summed_NF, weight_OF, bias_O, types.frozen)
        codes_KNX = torch.stack(
            [left(inner_NF, _of(keep_KNF, k)).to(types.experts) @ down_XF.T for k, inner_NF in enumerate(inner_KNF)]
        )
        chosen_NX = _summed(
            codes_KNX, weights_KN.to(types.experts), masks_KNE.to(types.experts), len(A_ERF), len(B_EOR)
        )
        sum_NO = y_NO.to(types.experts).addmm_(chosen_NX, up(B_EOR).to(types.experts), alpha=scaling)
        ctx.save_for_backward(inner_KNF, keep_KNF, weights_KN, A_ERF, B_EOR, masks_KNE, weight_OF, codes_KNX)
        ctx.scaling, ctx.types = scaling, types
        return sum_NO.to(types.frozen)

    @staticmethod
    @once_differentiable
    @keeps_types
    def backward(ctx: Any, grad_NO: Tensor) -> tuple[Tensor | None, ...]:
        inner_KNF, keep_KNF, weights_KN, A_ERF, B_EOR, masks_KNE, weight_OF, codes_KNX = ctx.saved_tensors
        types, sizes = ctx.types, (len(A_ERF), len(B_EOR))
        own_NO, low_ERF = grad_NO.to(types.experts), A_ERF.to(types.experts)
        low_KN, low_KNE = weights_KN.to(types.experts), masks_KNE.to(types.experts)
        grad_up_XO = _summed(codes_KNX, low_KN, low_KNE, *sizes).T @ own_NO
        grad_B = grad_up_XO.mul_(ctx.scaling).view(len(B_EOR), A_ERF.shape[1], -1).transpose(1, 2).to(B_EOR.dtype)
        grad_NF = grad_NO @ weight_OF.to(types.frozen)
        back_NX = (own_NO @ up(B_EOR).to(types.experts).T).mul_(ctx.scaling)
        grad_down_XF = torch.zeros_like(low_ERF).flatten(0, 1)
        grad_inner_KNF = torch.empty_like(inner_KNF)
        grad_weights_KN = torch.empty_like(weights_KN)
        for k, weights_N in enumerate(low_KN):
            inner_NF, keep_NF = inner_KNF[k], _of(keep_KNF, k)
            own_NX = ungated(back_NX, low_KNE[k], *sizes)
            of_base_N = torch.linalg.vecdot(grad_NF, inner_NF.to(types.frozen))
            grad_weights_KN[k] = of_base_N + torch.linalg.vecdot(own_NX, codes_KNX[k])
            own_NX = own_NX * weights_N[:, None]
            grad_down_XF.addmm_(own_NX.T, left(inner_NF, keep_NF).to(types.experts))
            torch.mul(grad_NF, weights_KN[k].to(grad_NF.dtype)[:, None], out=grad_inner_KNF[k])
            through(ByChannel(), [own_NX], [low_ERF], keep_NF, grad_inner_KNF[k])
        grad_A = grad_down_XF.view(A_ERF.shape).to(A_ERF.dtype)
        return grad_inner_KNF, None, grad_weights_KN, grad_A, grad_B, None, None, None, None, None


def _of(keep_KNF: Tensor | None, k: int) -> Tensor | None:
    return None if keep_KNF is None else keep_KNF[k]


def _summed(codes_KNX: Tensor, weights_KN: Tensor, masks_KNE: Tensor, downs: int, ups: int) -> Tensor:
    """Returns the code B takes, summed over a token's experts."""
    parts = [
        gated(code_NX, mask_NE * weights_N[:, None], downs, ups)
        for code_NX, weights_N, mask_NE in zip(codes_KNX, weights_KN, masks_KNE, strict=True)
    ]
    return torch.stack(parts).sum(dim=0)
