"""The localized balancing constraint of LoRAMoE: one half of the experts is pushed towards each kind of data.

Dou et al., LoRAMoE, ACL 2024, arXiv:2312.09979. Experts form two groups (first and second half), domains two kinds.

    Q[e, b] = sum over the tokens of row b of the weight of expert e
    Z = I * Q,    I[e, b] = 1 + delta if expert e's group is row b's kind, else 1 - delta

The paper's loss is var(Z) / mean(Z); the authors' code divides by mean(Z)^2, the squared coefficient of variation,
which does not change when all rows become longer. Both are here.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from loramix.routing import Routing


def localized_balance(routings: Iterable[Routing], kinds_B: Tensor, delta: float = 0.1) -> Tensor:
    """Returns the paper's form, var(Z) / mean(Z), mean over routers.

    Args:
        routings: token routings of one forward.
        kinds_B: the kind of data of each row, 0 or 1, int64 (B,).
        delta: how far the two groups are pushed apart.
    """
    return _mean(z.var(correction=0) / z.mean().clamp(min=1e-9) for z in _weighted(routings, kinds_B, delta))


def localized_balance_cv(routings: Iterable[Routing], kinds_B: Tensor, delta: float = 0.1) -> Tensor:
    """Returns the form of the authors' code, var(Z) / mean(Z)^2, mean over routers; arguments as above."""
    return _mean(z.var(correction=0) / z.mean().square().clamp(min=1e-9) for z in _weighted(routings, kinds_B, delta))


def _weighted(routings: Iterable[Routing], kinds_B: Tensor, delta: float) -> Iterable[Tensor]:
    """Yields Z_EB of each router."""
    rows = len(kinds_B)
    for routing in routings:
        if routing.probabilities is None or routing.level != "token":
            continue
        experts = routing.probabilities.shape[1]
        counted_BTE = (routing.probabilities * routing.mask[:, None]).view(rows, -1, experts)
        groups_E = (torch.arange(experts, device=kinds_B.device) * 2) // experts
        push_EB = torch.where(groups_E[:, None] == kinds_B[None, :], 1 + delta, 1 - delta)
        yield push_EB * counted_BTE.sum(dim=1).T


def _mean(losses: Iterable[Tensor]) -> Tensor:
    collected = list(losses)
    if not collected:
        raise ValueError(
            "localized balancing needs token routers, but none ran in this forward. Check that the adapter is enabled "
            "and that its method has token routers."
        )
    return torch.stack(collected).mean()
