"""Experts of whole rows that lie one after the other in one long row: each row's tokens through its own experts.

What `per_sequence` does for a padded batch, without the padding: cost K * R for every token, whatever E is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from loramix.experts.fused import Layer, fused
from loramix.routing import Routing

Row = tuple[slice, int]
"""A row's tokens, and its expert."""


@dataclass(frozen=True)
class ByRows:
    """The experts' products for `experts.fused`, row by row; gates (N, K) of each layer. A code is (K, N, R).

    Attributes:
        choices: for each of the K choices, the rows.
    """

    choices: Sequence[Sequence[Row]]

    @staticmethod
    def of(routing: Routing) -> ByRows:
        """Returns the way of a sequence routing with segments; waits for the device."""
        assert routing.segments is not None
        spans = [slice(*span) for span in routing.segments.spans]
        return ByRows([list(zip(spans, experts, strict=True)) for experts in routing.id_lists()])

    def down(self, x_NI: Tensor, downs: Sequence[Tensor]) -> Sequence[Tensor]:
        """As `experts.fused.Way`."""
        ranks = [A_ERI.shape[1] for A_ERI in downs]
        code_KNX = x_NI.new_empty(len(self.choices), len(x_NI), sum(ranks))
        stacked = _Stacked(downs)
        for code_NX, rows in zip(code_KNX, self.choices, strict=True):
            for part, expert in rows:
                torch.mm(x_NI[part], stacked[expert].T, out=code_NX[part])
        return torch.split(code_KNX, ranks, dim=2)

    def weighed(self, code: Tensor, gates: Tensor | None, A_ERI: Tensor, B_EOR: Tensor) -> Tensor:
        """As `experts.fused.Way`."""
        assert gates is not None
        return code * gates.T[:, :, None]

    def add_up(self, out_NO: Tensor, weighed: Tensor, B_EOR: Tensor, scaling: float) -> None:
        """As `experts.fused.Way`."""
        for weighed_NR, rows in zip(weighed, self.choices, strict=True):
            for part, expert in rows:
                out_NO[part].addmm_(weighed_NR[part], B_EOR[expert % len(B_EOR)].T, alpha=scaling)

    def grad_up(self, grad_NO: Tensor, weighed: Tensor, B_EOR: Tensor, scaling: float) -> Tensor:
        """As `experts.fused.Way`."""
        grad_B = torch.zeros_like(B_EOR)
        for weighed_NR, rows in zip(weighed, self.choices, strict=True):
            for part, expert in rows:
                grad_B[expert % len(B_EOR)].addmm_(grad_NO[part].T, weighed_NR[part], alpha=scaling)
        return grad_B

    def back(self, grad_NO: Tensor, B_EOR: Tensor, scaling: float) -> Tensor:
        """As `experts.fused.Way`."""
        back_KNR = grad_NO.new_empty(len(self.choices), len(grad_NO), B_EOR.shape[2])
        for back_NR, rows in zip(back_KNR, self.choices, strict=True):
            for part, expert in rows:
                torch.mm(grad_NO[part], B_EOR[expert % len(B_EOR)], out=back_NR[part])
        return back_KNR.mul_(scaling)

    def unweighed(
        self, back: Tensor, code: Tensor, gates: Tensor | None, A_ERI: Tensor, B_EOR: Tensor, wanted: bool
    ) -> tuple[Tensor, Tensor | None]:
        """As `experts.fused.Way`."""
        assert gates is not None
        grad_gates_NK = (back * code).sum(dim=2).T if wanted else None
        return back.mul_(gates.T[:, :, None]), grad_gates_NK

    def grad_down(self, backs: Sequence[Tensor], x_NI: Tensor, downs: Sequence[Tensor]) -> list[Tensor]:
        """As `experts.fused.Way`."""
        back_KNX, grads = _joined(backs), [torch.zeros_like(A_ERI) for A_ERI in downs]
        for back_NX, rows in zip(back_KNX, self.choices, strict=True):
            for part, expert in rows:
                if len(grads) == 1:
                    grads[0][expert % len(grads[0])].addmm_(back_NX[part].T, x_NI[part])
                    continue
                grad_XI = back_NX[part].T @ x_NI[part]
                for grad_ERI, own_RI in zip(grads, torch.split(grad_XI, [one.shape[1] for one in grads]), strict=True):
                    grad_ERI[expert % len(grad_ERI)].add_(own_RI)
        return grads

    def back_down(self, backs: Sequence[Tensor], downs: Sequence[Tensor], into_NI: Tensor | None) -> Tensor:
        """As `experts.fused.Way`."""
        back_KNX, stacked = _joined(backs), _Stacked(downs)
        if into_NI is None:
            into_NI = back_KNX.new_zeros(back_KNX.shape[1], downs[0].shape[2])
        for back_NX, rows in zip(back_KNX, self.choices, strict=True):
            for part, expert in rows:
                into_NI[part].addmm_(back_NX[part], stacked[expert])
        return into_NI


class _Stacked:
    """An expert's A of some layers as one matrix (X, I), made when it is asked for."""

    def __init__(self, downs: Sequence[Tensor]) -> None:
        self._downs, self._made = downs, dict[int, Tensor]()

    def __getitem__(self, expert: int) -> Tensor:
        if expert not in self._made:
            own = [A_ERI[expert % len(A_ERI)] for A_ERI in self._downs]
            self._made[expert] = own[0] if len(own) == 1 else torch.cat(own)
        return self._made[expert]


def _joined(backs: Sequence[Tensor]) -> Tensor:
    return backs[0] if len(backs) == 1 else torch.cat(list(backs), dim=2)


def weights_by_token(routing: Routing, like: Tensor) -> Tensor:
    """Returns the weights of a sequence routing at each token, (N, K), in the type of `like`."""
    assert routing.segments is not None
    return routing.segments.spread(routing.weights.to(like.dtype))


def by_segment(y_1NO: Tensor, x_1NI: Tensor, A_ERI: Tensor, B_EOR: Tensor, routing: Routing, scaling: float) -> Tensor:
    """Apply by rows; a sequence routing with segments. Arguments and result as in `experts.apply`, B = 1 and T = N."""
    # Not [0], whose backward fills a second tensor of that size.
    layer = Layer(A_ERI, B_EOR, weights_by_token(routing, x_1NI), scaling, y_NO=y_1NO.squeeze(0))
    return fused([layer], x_1NI.squeeze(0), None, ByRows.of(routing))[0][None]
