"""Losses that keep routers from sending everything to a few experts.

Each is computed for every router on its own and then averaged over routers. Taken over the concatenation of all layers,
as some libraries do, layers could cancel out; summed, the weight would depend on depth.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from loramix.losses.mean import mean_of
from loramix.routing import Routing

_MISSING = (
    "a balance loss needs router probabilities, but no router gave any in this forward. Check that the adapter "
    "is enabled and that its method has a token router."
)


def load_balance(routings: Iterable[Routing]) -> Tensor:
    """Returns Switch's balance loss, mean over routers; 1 where the load is even, up to E where one expert has all.

        L = E * sum_e f_e P_e,   f_e = share of the choices that fell on e,   P_e = mean probability of e

    Fedus et al. 2021, eq. 4; MoSLD's eq. 4 with its errors resolved (docs/methods/mosld.md). f counts all K choices of
    a token; padding counts in neither. P is the softmax before the choice: there is no second softmax. The gradient
    flows through P alone.

    Args:
        routings: by token or sequence; those without probabilities are passed over.
    """
    each = (
        routing.probabilities.shape[1] * (_shares(routing) * _mean_probabilities(routing)).sum()
        for routing in routings
        if routing.probabilities is not None
    )
    return mean_of(each, _MISSING)


def router_z(routings: Iterable[Routing]) -> Tensor:
    """Returns the z-loss, mean over routers:  mean over tokens of logsumexp(logits)^2.

    Keeps logits small, so that the softmax stays exact in low precision. Zoph et al., ST-MoE, 2022, eq. 5.
    """
    losses = []
    for routing in routings:
        if routing.logits is not None:
            count = routing.mask.sum().clamp(min=1)
            losses.append((routing.logits.logsumexp(dim=1).square() * routing.mask).sum() / count)
    return mean_of(losses, _MISSING)


def gate_balance(routings: Iterable[Routing]) -> Tensor:
    """Returns MoLE's balance loss:  -log prod_e q_e,   q_e the mean weight of expert e over all gates and tokens.

    Wu et al., ICLR 2024, eq. 12. Its least value is E log E, at q_e = 1/E. One figure over all gates, not one per gate:
    that is how the paper defines q.
    """
    means = [_mean_probabilities(routing) for routing in routings if routing.probabilities is not None]
    return -torch.stack(means).mean(dim=0).clamp(min=1e-9).log().sum()


def _shares(routing: Routing) -> Tensor:
    """Returns f_E: the share of each expert in the choices of the places that count."""
    assert routing.probabilities is not None
    chosen_SK = routing.chosen()
    counted_SK = routing.mask[:, None].expand_as(chosen_SK).to(routing.probabilities.dtype)
    counts_E = routing.probabilities.new_zeros(routing.probabilities.shape[1])
    counts_E = counts_E.index_add(0, chosen_SK.flatten(), counted_SK.flatten())
    return counts_E / counts_E.sum().clamp(min=1)


def _mean_probabilities(routing: Routing) -> Tensor:
    """Returns P_E: the mean probability of each expert over the places that count."""
    assert routing.probabilities is not None
    weighted_SE = routing.probabilities * routing.mask[:, None]
    return weighted_SE.sum(dim=0) / routing.mask.sum().clamp(min=1)
