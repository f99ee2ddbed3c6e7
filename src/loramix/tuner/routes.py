"""What `route` returns: for each prompt, which expert answers and why."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from loramix.routing import Routing
from loramix.tuner.decisions import settle


@dataclass(frozen=True)
class Route:
    """The routing of one prompt.

    Attributes:
        expert: the expert that answers. Under "per_layer" there is no single one: the expert that most layers follow.
        decision: how it was settled.
        probabilities: by expert, what the decision compared (see `decisions.settle`); 1 for a pinned expert.
        votes: by layer, the expert its router chose; empty for "pinned". Only layers that were read.
    """

    expert: str
    decision: str
    probabilities: dict[str, float]
    votes: dict[str, str]


def routes_from(routings: Mapping[str, Routing], decision: str, experts: Sequence[str]) -> list[Route]:
    """Returns the routes of all rows of one forward."""
    ids_B, probabilities_BE = settle(routings, decision)
    votes_BL = {
        scope: routing.logits.argmax(dim=1).tolist()
        for scope, routing in routings.items()
        if routing.logits is not None
    }
    return [
        Route(
            expert=experts[expert],
            decision=decision,
            probabilities=dict(zip(experts, probabilities, strict=True)),
            votes={scope: experts[votes[row]] for scope, votes in votes_BL.items()},
        )
        for row, (expert, probabilities) in enumerate(zip(ids_B.tolist(), probabilities_BE.tolist(), strict=True))
    ]


def pinned_route(expert: str, experts: Sequence[str]) -> Route:
    """Returns the route of a prompt whose expert the caller names."""
    return Route(expert, "pinned", {name: float(name == expert) for name in experts}, votes={})
