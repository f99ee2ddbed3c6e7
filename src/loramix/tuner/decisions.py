"""How the routers of all layers settle on one expert per sequence.

MoA routes per layer but answers with one expert; the paper compares voting among routers with taking the last router
and prefers the last (methods.md 1.3). A decision is written as a word:

    last       the router of the last adapted layer
    layer:k    the router of layer k
    vote       the expert most layers chose; ties go to the highest summed probability
    per_layer  no common expert: each layer follows its own router
    pinned     none is asked: the caller names the expert
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from loramix.errors import ConfigError
from loramix.routing import Routing

WORDS = ("last", "vote", "per_layer", "pinned")


def decision_problem(decision: str) -> str | None:
    """Returns what is wrong with a decision word, or None."""
    if decision in WORDS or (decision.startswith("layer:") and decision[6:].isdigit()):
        return None
    return f"decision = {decision!r}: expected one of {', '.join(WORDS)} or layer:k with the number of a layer."


def last_scope_needed(decision: str, scopes: Sequence[str]) -> str:
    """Returns the scope after whose router the prompt needs to be read no further.

    Args:
        decision: a decision other than "pinned".
        scopes: all scopes with a router, in forward order.

    Raises:
        ConfigError: the named layer has no router.
    """
    if not decision.startswith("layer:"):
        return scopes[-1]
    number = decision.removeprefix("layer:")
    for scope in scopes:
        if scope.rpartition(".")[2] == number:
            return scope
    raise ConfigError(
        f"decision = {decision!r}: no router in layer {number}. Expected one of "
        f"{', '.join(scope.rpartition('.')[2] for scope in scopes)}."
    )


def settle(routings: Mapping[str, Routing], decision: str) -> tuple[Tensor, Tensor]:
    """Returns the expert of each row, int64 (B,), and what the decision compared, (B, E), rows summing to 1.

    For "last" and "layer:k" that is the deciding router's softmax, for "vote" the share of votes, for "per_layer" the
    mean of the routers' probabilities (the expert is then the one that most layers follow).

    Args:
        routings: by scope in forward order, up to the deciding one at least.
        decision: a decision other than "pinned".
    """
    probabilities_LBE = torch.stack([r.logits.softmax(dim=1) for r in routings.values() if r.logits is not None])
    if decision == "last":
        deciding_BE = probabilities_LBE[-1]
        return deciding_BE.argmax(dim=1), deciding_BE
    if decision.startswith("layer:"):
        deciding_BE = probabilities_LBE[list(routings).index(last_scope_needed(decision, list(routings)))]
        return deciding_BE.argmax(dim=1), deciding_BE
    layers, _, experts = probabilities_LBE.shape
    votes_BE = torch.nn.functional.one_hot(probabilities_LBE.argmax(dim=2), experts).sum(dim=0).float()
    # Summed probabilities lie below layers + 1, so they order ties and never overrule a vote.
    chosen_B = (votes_BE + probabilities_LBE.sum(dim=0) / (layers + 1)).argmax(dim=1)
    if decision == "vote":
        return chosen_B, votes_BE / layers
    return chosen_B, probabilities_LBE.mean(dim=0)
