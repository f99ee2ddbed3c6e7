"""How long each row trains: as many examples as the longest row of two stages, counted as they are really seen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from loramix.budget import rows_learned, steps, steps_for
from loramix.comparison.rows import LONGER, Row, starts_from_experts
from loramix.corpus import Encoded
from loramix.methods import method_named
from loramix.settings import Experiment
from loramix.training.settings import TrainingSettings


@dataclass(frozen=True)
class Lengths:
    """What the longest two-stage row learns of some data.

    Attributes:
        sizes: training examples by domain.
        second, joint_steps: settings of its second stage, and how many steps that takes.
        rows: by domain the examples of stage 1 and its share of stage 2; under None those of all domains. Empty where
            no row has two stages: all then train by their own settings.
    """

    sizes: Mapping[str, int]
    second: TrainingSettings
    joint_steps: int
    rows: Mapping[str | None, int]

    def as_long(self, stage: Mapping[str, Any], experiment: Experiment, domain: str | None) -> dict[str, Any]:
        """Returns the settings of a method's only stage, as long as both of the longest row.

        Args:
            stage: its settings.
            experiment: for what the settings leave out.
            domain: the only domain it learns; None for all.
        """
        if not self.rows:
            return dict(stage)
        size = sum(self.sizes.values()) if domain is None else self.sizes[domain]
        return {**stage, "max_steps": steps_for(self.rows[domain], _settings(experiment, stage), size)}


def lengths_of(rows: Sequence[Row], experiment: Experiment, data: Encoded) -> Lengths:
    """Returns the lengths for some data.

    Args:
        rows: of the comparison; the one that starts from experts and learns most in its second stage counts, else
            `lora-long`; a second stage without gradient steps has no length.
        experiment: of the row the lengths are for.
        data: its examples.
    """
    sizes = {domain: len(examples) for domain, examples in data.train.items()}
    whole = sum(sizes.values())
    two = [row for row in rows if row.method == LONGER or starts_from_experts(row.method)]
    if not two:
        return Lengths(sizes, _settings(experiment, {}), 0, {})
    stepped = [row for row in two if row.method == LONGER or method_named(row.method).stages[-1].takes_steps]
    mixing = [row for row in stepped if row.method != LONGER] or stepped
    longest = max(mixing, key=lambda row: rows_learned(_settings(experiment, row.stages[1]), whole), default=None)
    first = _settings(experiment, (longest or two[0]).stages[0])
    second, joint_steps, joint_rows = first, 0, 0
    if longest is not None:
        second = _settings(experiment, longest.stages[1])
        joint_steps, joint_rows = steps(second, whole), rows_learned(second, whole)
    shares = data.shares(experiment.data)
    alone = {domain: rows_learned(first, size) for domain, size in sizes.items()}
    learned: dict[str | None, int] = {}
    for domain, count in alone.items():
        learned[domain] = count + round(joint_rows * shares[domain])
    learned[None] = sum(alone.values()) + joint_rows
    return Lengths(sizes, second, joint_steps, learned)


def _settings(experiment: Experiment, stage: Mapping[str, Any]) -> TrainingSettings:
    return experiment.model_copy(update={"training": dict(stage)}).settings({})
