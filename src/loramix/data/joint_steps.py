"""The steps that several trainings would take alone, taken together: the rows of each of them in one batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain, zip_longest
from typing import Any

from torch.utils.data import Dataset

from loramix.data.collation import Example
from loramix.data.mixing import MixtureSampler


def steps_alone(
    examples: Sequence[Example], batch_size: int, accumulated: int, seed: int, steps: int
) -> list[list[Example]]:
    """Returns the rows of each step of one domain's training in one process, in the order `train_stage` takes them.

    Args:
        examples: of the domain.
        batch_size: rows of a micro-batch.
        accumulated: micro-batches of a step; fewer at the end of an epoch.
        seed: of the order.
        steps: how many.
    """
    lengths = [example.length for example in examples]
    order = MixtureSampler([len(examples)], [1.0], lengths, batch_size, seed)
    found: list[list[Example]] = []
    epoch = 0
    while len(found) < steps:
        order.set_epoch(epoch)
        rows = [examples[place] for place in order]
        found += [rows[i : i + batch_size * accumulated] for i in range(0, len(rows), batch_size * accumulated)]
        epoch += 1
    return found[:steps]


class JointSteps(Dataset[list[Example]]):
    """Item t holds the rows that all trainings learn in their step t; trainings that are done have none.

    Args:
        trainings: the steps of each, from `steps_alone`.
    """

    def __init__(self, trainings: Sequence[Sequence[list[Example]]]) -> None:
        self._steps = [list(chain(*rows)) for rows in zip_longest(*trainings, fillvalue=[])]

    def __len__(self) -> int:
        return len(self._steps)

    def __getitem__(self, step: int) -> list[Example]:
        return self._steps[step]


@dataclass(frozen=True)
class JointCollator:
    """Puts the rows of steps into one batch.

    Attributes:
        collator: of rows.
    """

    collator: Callable[[Sequence[Example]], dict[str, Any]]

    def __call__(self, steps: Sequence[Sequence[Example]]) -> dict[str, Any]:
        return self.collator([example for rows in steps for example in rows])
