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

from loramix.experts.fused import gated, ungated, up
from loramix.routing import Routing


def expand(
    base_layer: nn.Linear, x_BTI: Tensor, A_ERI: Tensor, B_EFR: Tensor, routing: Routing, scaling: float
) -> Tensor:
    """Returns base_layer(x) + s * B_{e_k} A_{e_k} x for each of a token's K experts, (K, B, T, F)."""
    masks_KNE = _masks(routing, max(len(A_ERI), len(B_EFR)), x_BTI)
    out_KNF: Tensor = _Expand.apply(  # type: ignore[no-untyped-call]
        x_BTI.reshape(-1, x_BTI.shape[-1]), A_ERI, B_EFR, masks_KNE, base_layer.weight, base_layer.bias, scaling
    )
    return out_KNF.view(len(masks_KNE), *x_BTI.shape[:-1], -1)


def contract(
    base_layer: nn.Linear, inner_KBTF: Tensor, A_ERF: Tensor, B_EOR: Tensor, routing: Routing, scaling: float
) -> Tensor:
    """Returns base_layer(sum_k g_k a_k) + s * sum_k g_k B_{e_k} A_{e_k} a_k, (B, T, O)."""
    masks_KNE = _masks(routing, max(len(A_ERF), len(B_EOR)), inner_KBTF)
    weights_KN = routing.weights.T.to(inner_KBTF.dtype)
    out_NO: Tensor = _Contract.apply(  # type: ignore[no-untyped-call]
        inner_KBTF.flatten(1, 2), weights_KN, A_ERF, B_EOR, masks_KNE, base_layer.weight, base_layer.bias, scaling
    )
    return out_NO.view(*inner_KBTF.shape[1:-1], -1)


def _masks(routing: Routing, num_experts: int, like: Tensor) -> Tensor:
    """Returns 1 where a token's k-th expert is e, (K, N, E)."""
    experts_E = torch.arange(num_experts, device=like.device)
    return (routing.chosen().T[:, :, None] == experts_E).to(like.dtype)


class _Expand(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_NI: Tensor,
        A_ERI: Tensor,
        B_EFR: Tensor,
        masks_KNE: Tensor,
        weight_FI: Tensor,
        bias_F: Tensor | None,
        scaling: float,
    ) -> Tensor:
        out_KNF = x_NI.new_empty(len(masks_KNE), len(x_NI), len(weight_FI))
        torch.mm(x_NI, weight_FI.T, out=out_KNF[0])
        if bias_F is not None:
            out_KNF[0].add_(bias_F)
        out_KNF[1:] = out_KNF[0]
        code_NX, up_XF = x_NI @ A_ERI.flatten(0, 1).T, up(B_EFR)
        for out_NF, mask_NE in zip(out_KNF, masks_KNE, strict=True):
            out_NF.addmm_(gated(code_NX, mask_NE, len(A_ERI), len(B_EFR)), up_XF, alpha=scaling)
        ctx.save_for_backward(x_NI, A_ERI, B_EFR, masks_KNE, weight_FI, code_NX)
        ctx.scaling = scaling
        return out_KNF

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_KNF: Tensor) -> tuple[Tensor | None, ...]:
        x_NI, A_ERI, B_EFR, masks_KNE, weight_FI, code_NX = ctx.saved_tensors
        up_XF = up(B_EFR)
        grad_up_XF = torch.zeros_like(up_XF)
        back_NX = torch.zeros_like(code_NX)
        for grad_NF, mask_NE in zip(grad_KNF, masks_KNE, strict=True):
            grad_up_XF.addmm_(gated(code_NX, mask_NE, len(A_ERI), len(B_EFR)).T, grad_NF, alpha=ctx.scaling)
            back_NX.add_(ungated((grad_NF @ up_XF.T).mul_(ctx.scaling), mask_NE, len(A_ERI), len(B_EFR)))
        grad_A = (back_NX.T @ x_NI).view(A_ERI.shape)
        grad_B = grad_up_XF.view(len(B_EFR), A_ERI.shape[1], -1).transpose(1, 2)
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = grad_KNF.sum(dim=0) @ weight_FI
            grad_x.addmm_(back_NX, A_ERI.flatten(0, 1))
        return grad_x, grad_A, grad_B, None, None, None, None


class _Contract(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        inner_KNF: Tensor,
        weights_KN: Tensor,
        A_ERF: Tensor,
        B_EOR: Tensor,
        masks_KNE: Tensor,
        weight_OF: Tensor,
        bias_O: Tensor | None,
        scaling: float,
    ) -> Tensor:
        down_XF = A_ERF.flatten(0, 1)
        summed_NF = inner_KNF[0] * weights_KN[0, :, None]
        for inner_NF, weights_N in zip(inner_KNF[1:], weights_KN[1:], strict=True):
            summed_NF.addcmul_(inner_NF, weights_N[:, None])
        y_NO = summed_NF @ weight_OF.T if bias_O is None else torch.addmm(bias_O, summed_NF, weight_OF.T)
        codes_KNX = torch.stack([inner_NF @ down_XF.T for inner_NF in inner_KNF])
        y_NO.addmm_(_summed(codes_KNX, weights_KN, masks_KNE, len(A_ERF), len(B_EOR)), up(B_EOR), alpha=scaling)
        ctx.save_for_backward(inner_KNF, weights_KN, A_ERF, B_EOR, masks_KNE, weight_OF, codes_KNX)
        ctx.scaling = scaling
        return y_NO

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_NO: Tensor) -> tuple[Tensor | None, ...]:
        inner_KNF, weights_KN, A_ERF, B_EOR, masks_KNE, weight_OF, codes_KNX = ctx.saved_tensors
        sizes = len(A_ERF), len(B_EOR)
        down_XF = A_ERF.flatten(0, 1)
        grad_up_XO = _summed(codes_KNX, weights_KN, masks_KNE, *sizes).T @ grad_NO
        grad_B = grad_up_XO.mul_(ctx.scaling).view(len(B_EOR), A_ERF.shape[1], -1).transpose(1, 2)
        grad_NF = grad_NO @ weight_OF
        back_NX = (grad_NO @ up(B_EOR).T).mul_(ctx.scaling)
        grad_down_XF = torch.zeros_like(down_XF)
        grad_inner_KNF = torch.empty_like(inner_KNF)
        grad_weights_KN = torch.empty_like(weights_KN)
        for k, weights_N in enumerate(weights_KN):
            own_NX = ungated(back_NX, masks_KNE[k], *sizes)
            grad_weights_KN[k] = torch.linalg.vecdot(grad_NF, inner_KNF[k]) + torch.linalg.vecdot(own_NX, codes_KNX[k])
            own_NX = own_NX * weights_N[:, None]
            grad_down_XF.addmm_(own_NX.T, inner_KNF[k])
            torch.mul(grad_NF, weights_N[:, None], out=grad_inner_KNF[k])
            grad_inner_KNF[k].addmm_(own_NX, down_XF)
        return grad_inner_KNF, grad_weights_KN, grad_down_XF.view(A_ERF.shape), grad_B, None, None, None, None


def _summed(codes_KNX: Tensor, weights_KN: Tensor, masks_KNE: Tensor, downs: int, ups: int) -> Tensor:
    """Returns the code B takes, summed over a token's experts."""
    parts = [
        gated(code_NX, mask_NE * weights_N[:, None], downs, ups)
        for code_NX, weights_N, mask_NE in zip(codes_KNX, weights_KN, masks_KNE, strict=True)
    ]
    return torch.stack(parts).sum(dim=0)
