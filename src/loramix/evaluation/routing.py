"""How often the routers name the right domain: last, vote and each layer, with a confusion matrix."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from loramix.data.collation import Example
from loramix.routing import Routing
from loramix.tuner.decisions import settle


class RoutingRecord:
    """Collects what the routers said of each example; given to `score` as `seen`.

    Attributes after scoring:
        layers: names of the scopes, in forward order.
        last_N, vote_N: the expert each decision takes, int64 (N,).
        layers_LN: the expert each layer's router takes, int64 (layers, N).
    """

    def __init__(self, examples: int) -> None:
        self.layers: list[str] = []
        self.last_N = torch.zeros(examples, dtype=torch.int64)
        self.vote_N = torch.zeros(examples, dtype=torch.int64)
        self.layers_LN = torch.zeros(0, examples, dtype=torch.int64)

    def __call__(self, positions: list[int], model: nn.Module) -> None:
        routings: dict[str, Routing] = model.routings  # type: ignore[assignment]
        if not self.layers:
            self.layers = list(routings)
            self.layers_LN = torch.zeros(len(self.layers), len(self.last_N), dtype=torch.int64)
        self.last_N[positions] = settle(routings, "last")[0].cpu()
        self.vote_N[positions] = settle(routings, "vote")[0].cpu()
        for row, routing in enumerate(routings.values()):
            assert routing.logits is not None
            self.layers_LN[row, positions] = routing.logits.argmax(dim=1).cpu()


@dataclass(frozen=True)
class RouterAccuracy:
    """Accuracies from 0 to 1.

    Attributes:
        by_domain: domain -> decision -> accuracy; "per_layer" is the share of (layer, prompt) pairs that are right.
        overall: decision -> accuracy over all prompts.
        by_layer: layer -> accuracy over all prompts.
        confusion: decision -> rows true domain, columns chosen expert, counts.
        prompts: number of prompts.
    """

    by_domain: dict[str, dict[str, float]]
    overall: dict[str, float]
    by_layer: dict[str, float]
    confusion: dict[str, list[list[int]]]
    prompts: int


def router_accuracy(record: RoutingRecord, examples: Sequence[Example], domains: Sequence[str]) -> RouterAccuracy:
    """Returns the accuracies of a record against the examples' labels."""
    labels_N = torch.tensor([example.domain_id for example in examples])
    right = {
        "last": (record.last_N == labels_N).float(),
        "vote": (record.vote_N == labels_N).float(),
        "per_layer": (record.layers_LN == labels_N).float().mean(dim=0),
    }

    def share(right_N: Tensor, domain: int) -> float:
        return float(right_N[labels_N == domain].mean())

    return RouterAccuracy(
        by_domain={name: {d: share(right[d], i) for d in right} for i, name in enumerate(domains)},
        overall={decision: float(right_N.mean()) for decision, right_N in right.items()},
        by_layer={
            layer: float((chosen_N == labels_N).float().mean())
            for layer, chosen_N in zip(record.layers, record.layers_LN, strict=True)
        },
        confusion={
            decision: _confusion(labels_N, chosen_N, len(domains))
            for decision, chosen_N in (("last", record.last_N), ("vote", record.vote_N))
        },
        prompts=len(examples),
    )


def _confusion(labels_N: Tensor, chosen_N: Tensor, domains: int) -> list[list[int]]:
    counts: Any = torch.bincount(labels_N * domains + chosen_N, minlength=domains * domains)
    rows: list[list[int]] = counts.view(domains, domains).tolist()
    return rows
