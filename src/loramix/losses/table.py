"""The auxiliary losses by name: what each reads of a forward, and what its mean is taken over."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from loramix.losses.contrastive import contrastive
from loramix.losses.load_balance import gate_balance, load_balance, router_z
from loramix.losses.localized_balance import localized_balance, localized_balance_cv
from loramix.losses.routing_cross_entropy import routing_cross_entropy
from loramix.routing import ExpertOutputs, Routing


@dataclass(frozen=True)
class Seen:
    """What the losses may read of one forward.

    Attributes:
        routings: by scope.
        outputs: by module; empty unless the method has a loss that compares experts.
        domain_ids_B: the label of each row.
        kinds_B: which of two kinds of data each row is, 0 or 1.
    """

    routings: Mapping[str, Routing]
    outputs: Mapping[str, ExpertOutputs]
    domain_ids_B: Tensor
    kinds_B: Tensor


@dataclass(frozen=True)
class Auxiliary:
    """One auxiliary loss.

    Attributes:
        value: the mean over the rows or tokens of a micro-batch, a scalar.
        mean_over: what the mean is over; the micro-batches of a step are weighted by their share of it.
        weight: default factor.
        needs: what it cannot do without: "labels" of the rows, "outputs" of the experts, or nothing.
    """

    value: Callable[[Seen], Tensor]
    mean_over: Literal["rows", "tokens"]
    weight: float
    needs: Literal["labels", "outputs"] | None = None


AUXILIARY: dict[str, Auxiliary] = {
    "routing_cross_entropy": Auxiliary(
        lambda seen: routing_cross_entropy(seen.routings, seen.domain_ids_B).mean(), "rows", 0.1, "labels"
    ),
    "load_balance": Auxiliary(lambda seen: load_balance(seen.routings.values()), "tokens", 1e-3),
    "router_z": Auxiliary(lambda seen: router_z(seen.routings.values()), "tokens", 1e-3),
    "localized_balance": Auxiliary(
        lambda seen: localized_balance(seen.routings.values(), seen.kinds_B), "rows", 0.1, "labels"
    ),
    "localized_balance_cv": Auxiliary(
        lambda seen: localized_balance_cv(seen.routings.values(), seen.kinds_B), "rows", 0.1, "labels"
    ),
    "gate_balance": Auxiliary(lambda seen: gate_balance(seen.routings.values()), "tokens", 0.5),
    "contrastive": Auxiliary(lambda seen: contrastive(seen.outputs.values()), "tokens", 0.1, "outputs"),
}
