"""All experts' channels for every token, weighed by dense gates: two wide GEMMs, whatever the routing is.

c = gates * (x A_cat^T),    delta = s * c B_cat
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class ByChannel:
    """The experts' products for `experts.fused`, one wide GEMM each; gates (N, E) by layer, None for a single expert
    with weight 1. Layers that read the same input have one product with all their A, and one back to that input."""

    def down(self, x_NI: Tensor, downs: Sequence[Tensor]) -> Sequence[Tensor]:
        """As `experts.fused.Way`."""
        code_NX = x_NI @ _side_by_side(downs).T
        return torch.split(code_NX, [_channels(A_ERI) for A_ERI in downs], dim=1)

    def weighed(self, code: Tensor, gates: Tensor | None, A_ERI: Tensor, B_EOR: Tensor) -> Tensor:
        """As `experts.fused.Way`."""
        return gated(code, gates, len(A_ERI), len(B_EOR))

    def add_up(self, out_NO: Tensor, weighed: Tensor, B_EOR: Tensor, scaling: float) -> None:
        """As `experts.fused.Way`."""
        out_NO.addmm_(weighed, up(B_EOR), alpha=scaling)

    def grad_up(self, grad_NO: Tensor, weighed: Tensor, B_EOR: Tensor, scaling: float) -> Tensor:
        """As `experts.fused.Way`."""
        grad_up_XO = (weighed.T @ grad_NO).mul_(scaling)
        return grad_up_XO.view(len(B_EOR), B_EOR.shape[2], -1).transpose(1, 2)

    def back(self, grad_NO: Tensor, B_EOR: Tensor, scaling: float) -> Tensor:
        """As `experts.fused.Way`."""
        return (grad_NO @ up(B_EOR).T).mul_(scaling)

    def unweighed(
        self, back: Tensor, code: Tensor, gates: Tensor | None, A_ERI: Tensor, B_EOR: Tensor, wanted: bool
    ) -> tuple[Tensor, Tensor | None]:
        """As `experts.fused.Way`."""
        if gates is None:
            return back, None
        grad_gates = None
        if wanted:
            rank = A_ERI.shape[1]
            back_NER, code_NER = (_by_expert(one, one.shape[1] // rank) for one in (back, code))
            grad_gates = (back_NER * code_NER).sum(dim=2)
        return ungated(back, gates, len(A_ERI), len(B_EOR)), grad_gates

    def grad_down(self, backs: Sequence[Tensor], x_NI: Tensor, downs: Sequence[Tensor]) -> list[Tensor]:
        """As `experts.fused.Way`."""
        grads_XI = (torch.cat(list(backs), dim=1) if len(backs) > 1 else backs[0]).T @ x_NI
        parts = torch.split(grads_XI, [_channels(A_ERI) for A_ERI in downs])
        return [grad.view(A_ERI.shape) for grad, A_ERI in zip(parts, downs, strict=True)]

    def back_down(self, backs: Sequence[Tensor], downs: Sequence[Tensor], into_NI: Tensor | None) -> Tensor:
        """As `experts.fused.Way`."""
        back_NX = torch.cat(list(backs), dim=1) if len(backs) > 1 else backs[0]
        down_XI = _side_by_side(downs)
        return back_NX @ down_XI if into_NI is None else into_NI.addmm_(back_NX, down_XI)


def _side_by_side(downs: Sequence[Tensor]) -> Tensor:
    """Returns the A of some layers as one matrix, (X, I)."""
    return torch.cat([A_ERI.flatten(0, 1) for A_ERI in downs]) if len(downs) > 1 else downs[0].flatten(0, 1)


def _channels(A_ERI: Tensor) -> int:
    return A_ERI.shape[0] * A_ERI.shape[1]


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
    experts = gates_NE.shape[1]
    if downs == 1 and experts > 1:
        return (gates_NE[:, :, None] * code_NX[:, None, :]).flatten(1)
    by_expert_NER = _by_expert(code_NX, experts)
    if ups == 1 and experts > 1:
        return torch.bmm(gates_NE[:, None, :], by_expert_NER).squeeze(1)
    return (by_expert_NER * gates_NE[:, :, None]).flatten(1)


def ungated(back_NX: Tensor, gates_NE: Tensor, downs: int, ups: int) -> Tensor:
    """The transpose of `gated`: from the gradient of what B takes to the gradient of the code, (N, E * R) or (N, R).

    Args:
        back_NX: gradient of the gated code.
        gates_NE: dense weights.
        downs, ups: how many matrices A and B are stacks of.
    """
    experts = gates_NE.shape[1]
    if downs == 1 and experts > 1:
        return torch.bmm(gates_NE[:, None, :], _by_expert(back_NX, experts)).squeeze(1)
    if ups == 1 and experts > 1:
        return (gates_NE[:, :, None] * back_NX[:, None, :]).flatten(1)
    return (_by_expert(back_NX, experts) * gates_NE[:, :, None]).flatten(1)


def _by_expert(code_NX: Tensor, experts: int) -> Tensor:
    """Returns (N, E, R); N may be 0."""
    return code_NX.view(len(code_NX), experts, code_NX.shape[1] // experts)
