"""The localized balancing constraint of LoRAMoE: each half of the experts is loaded by one kind of data more.

Dou et al., LoRAMoE, ACL 2024, arXiv:2312.09979. Experts form two groups (first and second half), domains two kinds.

    Q[e, b] = sum over the tokens of row b of the weight of expert e
    Z = I * Q, made even: the loss is least where all of Z is equal, so an expert with the larger I is loaded less

Two forms, and they differ in more than a factor:

    paper   I = 1 + delta where expert e's group is row b's kind, else 1 - delta;   var(Z) / mean(Z)
    code    I = 1 + delta where it is not, else 1 - delta;   unbiased var(Z) / mean(Z)^2

Taken literally, the paper's I leaves a kind's own half with less of its load, against the paper's own words; in the
authors' code the two are the other way round, and a kind's own half gets more. Dividing by mean(Z)^2 (the squared
coefficient of variation) makes the loss indifferent to the length of the rows.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from loramix.losses.mean import mean_of
from loramix.routing import Routing

_MISSING = (
    "localized balancing needs token routers, but none ran in this forward. Check that the adapter is enabled "
    "and that its method has token routers."
)


def localized_balance(routings: Iterable[Routing], kinds_B: Tensor, delta: float = 0.1) -> Tensor:
    """Returns the paper's form, mean over routers.

    Args:
        routings: token routings of one forward.
        kinds_B: the kind of data of each row, 0 or 1, int64 (B,).
        delta: how far the two groups are pushed apart.
    """
    each = (z.var(correction=0) / z.mean().clamp(min=1e-9) for z in _weighted(routings, kinds_B, delta))
    return mean_of(each, _MISSING)


def localized_balance_cv(routings: Iterable[Routing], kinds_B: Tensor, delta: float = 0.1) -> Tensor:
    """Returns the form of the authors' code, mean over routers; arguments as above."""
    each = (z.var() / z.mean().square().clamp(min=1e-9) for z in _weighted(routings, kinds_B, -delta))
    return mean_of(each, _MISSING)


def _weighted(routings: Iterable[Routing], kinds_B: Tensor, delta: float) -> Iterable[Tensor]:
    """Yields Z_EB of each router, with I = 1 + delta for a kind's own group."""
    rows = len(kinds_B)
    for routing in routings:
        if routing.probabilities is None or routing.level != "token":
            continue
        experts = routing.probabilities.shape[1]
        counted_NE = routing.probabilities * routing.mask[:, None]
        if routing.segments is not None:
            counted_BE = routing.segments.sums(counted_NE)
        else:
            counted_BE = counted_NE.view(rows, -1, experts).sum(dim=1)
        groups_E = (torch.arange(experts, device=kinds_B.device) * 2) // experts
        push_EB = torch.where(groups_E[:, None] == kinds_B[None, :], 1 + delta, 1 - delta)
        yield push_EB * counted_BE.T
