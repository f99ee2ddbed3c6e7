"""Watches the routers while they learn: one that sends nearly all to one expert has stopped being a router."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping

import torch
from torch import Tensor

from loramix.routing import Routing

LOOKS = 3
"""Log entries a verdict is made of."""
NEARLY_ALL = 0.95
MIXED = 0.8
"""A router by sequence is judged only where no domain had more of the batches looked at than this."""


class CollapseWatch:
    """Sums up the loads of the experts, router by router, and says once if routers have collapsed."""

    def __init__(self) -> None:
        self._loads: deque[dict[str, Tensor]] = deque(maxlen=LOOKS)
        self._domains: deque[Tensor] = deque(maxlen=LOOKS)
        self._by_sequence = False
        self._told = False

    def look(self, routings: Mapping[str, Routing], domain_ids_B: Tensor, domains: int) -> None:
        """Takes in one batch; nothing waits for the device.

        Args:
            routings: of its forward, by scope.
            domain_ids_B: the domain of each row.
            domains: how many there are.
        """
        loads = {scope: load for scope, one in routings.items() if (load := _load(one)) is not None}
        if not loads:
            return
        self._by_sequence = all(one.level == "sequence" for one in routings.values())
        self._loads.append(loads)
        self._domains.append(torch.bincount(domain_ids_B, minlength=domains).float() / len(domain_ids_B))

    def numbers(self) -> dict[str, float]:
        """Returns of the last look the largest load of an expert at any router (0 to 1) and the least entropy of a
        router's loads (1: even, 0: one expert has all)."""
        if not self._loads:
            return {}
        loads = self._loads[-1]
        return {
            "router_load_max": max(float(load.max()) for load in loads.values()),
            "router_entropy_min": min(_entropy(load) for load in loads.values()),
        }

    def verdict(self) -> str | None:
        """Returns a warning with numbers if routers have collapsed and it was not said before."""
        if self._told or len(self._loads) < LOOKS:
            return None
        if self._by_sequence and float(torch.stack(list(self._domains)).mean(dim=0).max()) > MIXED:
            return None
        loads = self._mean()
        gone = {scope: load for scope, load in loads.items() if len(load) > 1 and float(load.max()) > NEARLY_ALL}
        if not gone:
            return None
        self._told = True
        scope, load = max(gone.items(), key=lambda one: float(one[1].max()))
        return (
            f"warning: {len(gone)} of {len(loads)} routers send nearly all to one expert; {scope} sends "
            f"{float(load.max()):.1%} to expert {int(load.argmax())} (entropy {_entropy(load):.2f} of 1). A balance "
            "loss (losses.load_balance), a lower router_learning_rate or more mixed batches keep routers apart."
        )

    def _mean(self) -> dict[str, Tensor]:
        return {scope: torch.stack([one[scope] for one in self._loads]).mean(dim=0) for scope in self._loads[-1]}


def _load(routing: Routing) -> Tensor | None:
    """Returns the share of each expert, (E,): of the weights for tokens; for sequences, whose expert a label may have
    named, of the routers' own first choices."""
    if routing.level == "sequence":
        if routing.logits is None:
            return None
        given_SE = torch.nn.functional.one_hot(routing.logits.argmax(dim=1), routing.logits.shape[1]).float()
    else:
        if routing.probabilities is None and routing.logits is None and routing.ids is not None:
            return None
        scored = routing.probabilities if routing.probabilities is not None else routing.logits
        given_SE = routing.gates(scored.shape[1] if scored is not None else routing.weights.shape[1])
    load_E = torch.where(routing.mask[:, None], given_SE.detach().float(), 0.0).nan_to_num(0.0, 0.0, 0.0).sum(dim=0)
    return load_E / load_E.sum().clamp(min=1e-9)


def _entropy(load_E: Tensor) -> float:
    if len(load_E) < 2:
        return 1.0
    return float(torch.special.entr(load_E).sum() / torch.tensor(float(len(load_E))).log())
