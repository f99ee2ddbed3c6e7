"""How well abstention tells prompts of no expert's domain from the others, by the scores of both."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from loramix.routers.abstention import fitted, threshold_for

BINS = 20


@dataclass(frozen=True)
class Outside:
    """What happens to the prompts of a domain without expert.

    Attributes:
        prompts: how many.
        abstained: the share of them that goes to the base.
        auroc: the chance that one of them scores higher than a held-out prompt of a learned domain, from 0 to 1.
    """

    prompts: int
    abstained: float
    auroc: float


def auroc(inside_N: Tensor, outside_M: Tensor) -> float:
    """Returns the area under the curve of abstentions against false alarms: the chance that a prompt from outside
    scores higher than one from inside, ties counted half.

    Args:
        inside_N: scores of prompts that have an expert.
        outside_M: scores of prompts that have none.
    """
    ordered_N = inside_N.double().sort().values
    outside_M = outside_M.double()
    below_M = torch.searchsorted(ordered_N, outside_M, side="left")
    up_to_M = torch.searchsorted(ordered_N, outside_M, side="right")
    return float((below_M + up_to_M).double().mean() / (2 * len(ordered_N)))


def outside(inside_N: Tensor, outside_M: Tensor, threshold: float) -> Outside:
    """Returns what happens to a domain without expert.

    Args:
        inside_N: scores of held-out prompts of the learned domains.
        outside_M: scores of its prompts.
        threshold: above which the base answers.
    """
    abstained = float((outside_M.double() > threshold).double().mean())
    return Outside(len(outside_M), abstained, auroc(inside_N, outside_M))


def left_out(
    train: Mapping[str, Tensor], held: Mapping[str, Tensor], keep: float, dims: int
) -> tuple[dict[str, Outside], Tensor, Tensor]:
    """Returns what would happen to each domain if it had no expert: it is left out, and all is fitted to the others.

    Beside it the scores of all held-out prompts of the others, and of those left out, as they fell in each turn.

    Args:
        train, held: by domain, what the router reads of training and of held-out prompts, (N, I).
        keep: the share of the others' held-out prompts that each threshold keeps.
        dims: D at most.
    """
    found: dict[str, Outside] = {}
    inside, beyond = [], []
    for domain in train:
        others = [name for name in train if name != domain]
        labels_N = torch.cat([torch.full((len(train[name]),), e) for e, name in enumerate(others)])
        part = fitted(torch.cat([train[name] for name in others]), labels_N, len(others), dims)
        inside_N = torch.cat([part.scores(held[name]) for name in others])
        outside_M = part.scores(held[domain])
        found[domain] = outside(inside_N, outside_M, threshold_for(inside_N, keep))
        inside.append(inside_N)
        beyond.append(outside_M)
    return found, torch.cat(inside), torch.cat(beyond)


def histogram(inside_N: Tensor, outside_M: Tensor) -> dict[str, Any]:
    """Returns how both kinds of prompts spread over the scores: the edges of the bins, and shares of each kind. What
    lies beyond the 98th of a hundred of the higher kind counts into the last bin."""
    both = torch.cat([inside_N, outside_M]).double()
    low = float(both.min())
    high = max(float(inside_N.double().quantile(0.98)), float(outside_M.double().quantile(0.98)), low + 1e-6)
    shares = {
        kind: (torch.histc(scores.double().clamp(low, high), BINS, low, high) / len(scores)).tolist()
        for kind, scores in (("inside", inside_N), ("outside", outside_M))
    }
    edges = torch.linspace(low, high, BINS + 1, dtype=torch.float64).tolist()
    return {"edges": edges, **shares}
