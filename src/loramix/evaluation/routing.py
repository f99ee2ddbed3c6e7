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
        sure_N: the probability that the last router gives the expert it takes, (N,).
    """

    def __init__(self, examples: int) -> None:
        self.layers: list[str] = []
        self.last_N = torch.zeros(examples, dtype=torch.int64)
        self.vote_N = torch.zeros(examples, dtype=torch.int64)
        self.layers_LN = torch.zeros(0, examples, dtype=torch.int64)
        self.sure_N = torch.zeros(examples)

    def __call__(self, positions: list[int], model: nn.Module) -> None:
        routings: dict[str, Routing] = model.routings  # type: ignore[assignment]
        if not self.layers:
            self.layers = list(routings)
            self.layers_LN = torch.zeros(len(self.layers), len(self.last_N), dtype=torch.int64)
        last_B, probabilities_BE = settle(routings, "last")
        self.last_N[positions] = last_B.cpu()
        self.sure_N[positions] = probabilities_BE.amax(dim=1).float().cpu()
        self.vote_N[positions] = settle(routings, "vote")[0].cpu()
        for row, routing in enumerate(routings.values()):
            assert routing.logits is not None
            self.layers_LN[row, positions] = routing.logits.argmax(dim=1).cpu()


@dataclass(frozen=True)
class Bin:
    """Prompts whose router was about equally sure: how sure on average, and how often right."""

    low: float
    high: float
    count: int
    confidence: float
    accuracy: float


@dataclass(frozen=True)
class Calibration:
    """Expected calibration error (Guo et al. 2017, section 2): the mean distance between how sure a router is and how
    often it is right, weighted by the prompts in each of ten bins of equal width. Empty bins are left out."""

    ece: float
    bins: list[Bin]


def calibration(sure_N: Tensor, right_N: Tensor, bins: int = 10) -> Calibration:
    """Returns the calibration of decisions.

    Args:
        sure_N: the probability given to what was decided, (N,).
        right_N: 1 where that was right, else 0, (N,).
        bins: how many, between 0 and 1.
    """
    bin_N = (sure_N * bins).long().clamp(0, bins - 1)
    found = []
    for number in range(bins):
        inside_N = bin_N == number
        if count := int(inside_N.sum()):
            confidence, accuracy = float(sure_N[inside_N].mean()), float(right_N[inside_N].mean())
            found.append(Bin(number / bins, (number + 1) / bins, count, confidence, accuracy))
    ece = sum(one.count * abs(one.confidence - one.accuracy) for one in found) / max(len(sure_N), 1)
    return Calibration(ece, found)


@dataclass(frozen=True)
class RouterAccuracy:
    """Accuracies from 0 to 1.

    Attributes:
        by_domain: domain -> decision -> accuracy; "per_layer" is the share of (layer, prompt) pairs that are right.
        overall: decision -> accuracy over all prompts.
        by_layer: layer -> accuracy over all prompts.
        confusion: decision -> rows true domain, columns chosen expert, counts.
        prompts: number of prompts.
        calibration: how far the last router's probability can be believed.
    """

    by_domain: dict[str, dict[str, float]]
    overall: dict[str, float]
    by_layer: dict[str, float]
    confusion: dict[str, list[list[int]]]
    prompts: int
    calibration: Calibration


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
        calibration=calibration(record.sure_N, right["last"]),
    )


def _confusion(labels_N: Tensor, chosen_N: Tensor, domains: int) -> list[list[int]]:
    counts: Any = torch.bincount(labels_N * domains + chosen_N, minlength=domains * domains)
    rows: list[list[int]] = counts.view(domains, domains).tolist()
    return rows
