"""What `route` takes and returns: prompts in, and for each of them which expert answers and why."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from loramix.data.prompts import encode_prompts
from loramix.errors import ConfigError, did_you_mean
from loramix.routing import NO_EXPERT, Routing
from loramix.tuner.abstaining import BASE, Verdict
from loramix.tuner.decisions import settle


@dataclass(frozen=True)
class Route:
    """The routing of one prompt.

    Attributes:
        expert: the expert that answers, or "base" where none fits. Under "per_layer" there is no single one: the expert
            that most layers follow.
        decision: how it was settled.
        probabilities: by expert, what the decision compared (see `decisions.settle`), also where none fits; 1 for what
            is pinned.
        votes: by layer, the expert its router chose; empty for "pinned". Only layers that were read.
        score: how far the prompt is from all domains, about 1 for their own; None where it was not asked.
        threshold: the score above which the base answers alone; None where it was not asked.
    """

    expert: str
    decision: str
    probabilities: dict[str, float]
    votes: dict[str, str]
    score: float | None = None
    threshold: float | None = None

    @property
    def probability(self) -> float | None:
        """What the decision gave the expert that answers; None where none fits."""
        return self.probabilities.get(self.expert)


def routes_from(
    routings: Mapping[str, Routing], decision: str, experts: Sequence[str], verdict: Verdict | None = None
) -> list[Route]:
    """Returns the routes of all rows of one forward."""
    ids_B, probabilities_BE = settle(routings, decision)
    votes_BL = {
        scope: routing.logits.argmax(dim=1).tolist()
        for scope, routing in routings.items()
        if routing.logits is not None
    }
    scores = [None] * len(ids_B) if verdict is None else verdict.scores_B.tolist()
    abstains = [False] * len(ids_B) if verdict is None else verdict.abstains().tolist()
    return [
        Route(
            expert=BASE if abstains[row] else experts[expert],
            decision=decision,
            probabilities=dict(zip(experts, probabilities, strict=True)),
            votes={scope: experts[votes[row]] for scope, votes in votes_BL.items()},
            score=scores[row],
            threshold=None if verdict is None else verdict.threshold,
        )
        for row, (expert, probabilities) in enumerate(zip(ids_B.tolist(), probabilities_BE.tolist(), strict=True))
    ]


def pinned_route(expert: str, experts: Sequence[str]) -> Route:
    """Returns the route of a prompt whose expert the caller names."""
    probabilities = {name: float(name == expert) for name in dict.fromkeys([*experts, expert])}
    return Route(expert, "pinned", probabilities, votes={})


def positions(names: Sequence[str], experts: Sequence[str], rows: int) -> list[int]:
    """Returns the positions of named experts, one for each of `rows` prompts; NO_EXPERT for "base".

    Raises:
        ConfigError: an unknown name, or another number of names than rows.
    """
    for name in names:
        if name not in experts and name != BASE:
            raise ConfigError(
                f"expert = {name!r}: no such expert. Expected one of {', '.join(experts)}, or {BASE}."
                f"{did_you_mean(name, experts)}"
            )
    if len(names) != rows:
        raise ConfigError(f"{len(names)} experts were named for {rows} prompts. Name one, or one for each prompt.")
    return [experts.index(name) if name in experts else NO_EXPERT for name in names]


def batches(
    prompts: str | Sequence[str] | None,
    tokenizer: Any,
    input_ids: Tensor | None,
    attention_mask: Tensor | None,
    batch_size: int,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields batches of (ids, mask) from texts or from tensors."""
    if input_ids is not None:
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        for start in range(0, len(input_ids), batch_size):
            yield input_ids[start : start + batch_size], mask[start : start + batch_size]
        return
    if prompts is None or tokenizer is None:
        raise ConfigError("route was given texts without a tokenizer. Pass tokenizer=..., or input_ids.")
    texts = [prompts] if isinstance(prompts, str) else list(prompts)
    for start in range(0, len(texts), batch_size):
        encoded = encode_prompts(tokenizer, texts[start : start + batch_size])
        yield encoded["input_ids"], encoded["attention_mask"]
