"""How often each expert is used, by domain and layer: the mean gate weight over the tokens (or prompts) that count."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from loramix.data.collation import Example
from loramix.routing import Routing


@dataclass(frozen=True)
class UseByDomain:
    """Shares of the experts.

    Attributes:
        layers: names of the scopes with a router, in forward order.
        by_domain: domain -> for each layer the share of each of its experts; a layer's shares sum to 1.
    """

    layers: list[str]
    by_domain: dict[str, list[list[float]]]


class ExpertUse:
    """Adds up gate weights batch by batch; given to `score` as `seen`.

    Weights of routers that do not normalise (sigmoid gates, capacity) are divided by their sum in the end, so that
    every layer shows how its experts share the work. A negative weight (LoRAHub) counts by its size.
    """

    def __init__(self, examples: Sequence[Example], domains: Sequence[str]) -> None:
        self.domains = list(domains)
        self.of_example = [example.domain_id for example in examples]
        self.sums: dict[str, Tensor] = {}

    def __call__(self, positions: list[int], model: nn.Module) -> None:
        routings: dict[str, Routing] = model.routings  # type: ignore[assignment]
        rows_B = torch.tensor([self.of_example[i] for i in positions])
        for scope, routing in routings.items():
            experts = _experts(routing)
            gates_SE = routing.gates(experts).detach().float().abs().cpu()
            gates_SE = gates_SE * routing.mask.cpu().unsqueeze(1)
            per_row_BE = gates_SE.view(len(positions), -1, experts).sum(dim=1)
            sums_DE = self.sums.setdefault(scope, torch.zeros(len(self.domains), experts, dtype=torch.float64))
            sums_DE.index_add_(0, rows_B, per_row_BE.double())

    def result(self) -> UseByDomain:
        """Returns the shares of all that was seen."""
        shares: dict[str, Any] = {
            scope: sums_DE / sums_DE.sum(dim=1, keepdim=True).clamp_min(1e-12) for scope, sums_DE in self.sums.items()
        }
        return UseByDomain(
            layers=list(shares),
            by_domain={
                domain: [[round(share, 6) for share in shares_DE[number].tolist()] for shares_DE in shares.values()]
                for number, domain in enumerate(self.domains)
            },
        )


def _experts(routing: Routing) -> int:
    """Returns E: the width of what scores all experts, or of the weights where all take part."""
    for scored in (routing.logits, routing.probabilities):
        if scored is not None:
            return int(scored.shape[1])
    if routing.ids is None:
        return int(routing.weights.shape[1])
    return int(routing.ids.max()) + 1
