"""Measures the models of a run on the held-out examples of each domain."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from loramix.data.collation import Example
from loramix.evaluation.routing import RouterAccuracy, RoutingRecord, router_accuracy
from loramix.evaluation.scoring import Score, perplexity, score

Held = Mapping[str, Sequence[Example]]
"""Held-out examples by domain, in the order of `domain_ids`."""


@dataclass(frozen=True)
class Row:
    """Perplexity of one model on one domain."""

    domain: str
    model: str
    perplexity: float
    nll: float
    tokens: int


def rows_of(name: str, scores: Mapping[str, Sequence[Score]]) -> list[Row]:
    """Returns a row for each domain from its examples' scores."""
    return [
        Row(domain, name, perplexity(parts), sum(p.nll for p in parts), sum(p.tokens for p in parts))
        for domain, parts in scores.items()
    ]


def score_domains(model: nn.Module, held: Held, *, pad_token_id: int, **how: Any) -> dict[str, list[Score]]:
    """Returns the scores of all examples, by domain; all domains go through the model together.

    Args:
        model: a base or a PeftModel with one expert.
        held: held-out examples by domain.
        pad_token_id: of the base.
        **how: for `score`.
    """
    everything = [example for examples in held.values() for example in examples]
    return by_domain(score(model, everything, pad_token_id=pad_token_id, **how), held)


def by_domain(scores: Sequence[Score], held: Held) -> dict[str, list[Score]]:
    """Returns the scores of all examples, dealt out to their domains again."""
    left = iter(scores)
    return {domain: [next(left) for _ in examples] for domain, examples in held.items()}


@dataclass(frozen=True)
class RoutedResult:
    """What a routed model was measured to do.

    Attributes:
        by_decision: oracle, last, vote, per_layer -> the scores of each domain's examples.
        routers: accuracies of the routers.
    """

    by_decision: dict[str, dict[str, list[Score]]]
    routers: RouterAccuracy


def measure_routed(
    model: nn.Module,
    held: Held,
    *,
    pad_token_id: int,
    batch_size: int = 8,
    seen: Callable[[list[int], nn.Module], None] | None = None,
    letters: Sequence[int] = (),
) -> RoutedResult:
    """Returns scores under oracle, last, vote and per-layer routing, and the routers' accuracy.

    One pass in which each layer follows its own router gives the per-layer score and what every router says; one pass
    with the label's expert gives the oracle. An example's score depends on its expert alone, so under "last" and "vote"
    only examples routed to another expert than the label's are scored again.

    Args:
        model: a PeftModel with a sequence-routed adapter.
        held: held-out examples by domain, in the order of the experts.
        pad_token_id: of the base.
        batch_size: examples scored together.
        seen, letters: as for `score`; `seen` is called in the first pass.
    """
    everything = [example for examples in held.values() for example in examples]
    record = RoutingRecord(len(everything))

    def both(positions: list[int], model: nn.Module) -> None:
        record(positions, model)
        if seen is not None:
            seen(positions, model)

    how = {"pad_token_id": pad_token_id, "batch_size": batch_size, "letters": letters}
    own = score(model, everything, decision="per_layer", seen=both, **how)  # type: ignore[arg-type]
    labels = [example.domain_id for example in everything]
    oracle = score(model, everything, experts=labels, **how)  # type: ignore[arg-type]
    by_decision = {"oracle": oracle, "per_layer": own}
    for decision, chosen_N in (("last", record.last_N), ("vote", record.vote_N)):
        chosen = chosen_N.tolist()
        astray = [i for i, label in enumerate(labels) if chosen[i] != label]
        scores = list(oracle)
        if astray:
            again = score(
                model,
                [everything[i] for i in astray],
                experts=[chosen[i] for i in astray],
                **how,  # type: ignore[arg-type]
            )
            for i, one in zip(astray, again, strict=True):
                scores[i] = one
        by_decision[decision] = scores
    return RoutedResult(
        by_decision={decision: by_domain(scores, held) for decision, scores in by_decision.items()},
        routers=router_accuracy(record, everything, list(held)),
    )
