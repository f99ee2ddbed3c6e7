"""How long a stage takes: by the pace of its steps, each kind measured once; roughly, where none can be measured."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from loramix.data.collation import Example
from loramix.models import load_skeleton
from loramix.planning.dry_run import DryRun
from loramix.planning.few_layers import FewLayers
from loramix.planning.pace import Pace, measured
from loramix.planning.product_speed import EFFICIENCY, gemm_rate
from loramix.planning.work import Work
from loramix.settings import Experiment


@dataclass(frozen=True)
class Amount:
    """How much of it there is.

    Attributes:
        tokens, learned: to be read, and of these to be learned.
        steps: of the optimizer.
        once: FLOPs beside the steps, in layers.
    """

    tokens: float
    learned: float
    steps: float
    once: float = 0.0


class Stopwatch:
    """Tells how long works of an experiment take on this machine, as it is when nothing else runs on it. Random numbers
    are begun anew by it (`kept_random`).

    Args:
        experiment: the settings.
        examples: that its stages learn.
    """

    def __init__(self, experiment: Experiment, examples: Sequence[Example]) -> None:
        self.experiment, self.examples = experiment, examples
        self._skeleton = load_skeleton(experiment.model_name_or_path)
        self._known: dict[str, Pace | str] = {}
        self._rate = 0.0

    def seconds(self, work: Work, amount: Amount, whole: DryRun, dry: Callable[[Any], DryRun]) -> tuple[float, str]:
        """Returns the seconds of a work, and a note about them: "" where there is none.

        Args:
            work: what is trained.
            amount: how much.
            whole: the whole model's dry run.
            dry: the same of another model.
        """
        kind = work.kind()
        if kind not in self._known:
            self._known[kind] = self._measured(work, whole, dry)
        pace, flops = self._known[kind], whole.flops_per_token
        if isinstance(pace, Pace):
            updates = amount.steps * whole.trained
            return pace.seconds(flops, amount.tokens, amount.learned, updates, amount.once), self._left_out(work)
        if not self._rate:
            self._rate = gemm_rate(self.experiment) * EFFICIENCY
        return (flops * amount.tokens + amount.once) / self._rate, pace

    def _measured(self, work: Work, whole: DryRun, dry: Callable[[Any], DryRun]) -> Pace | str:
        """Returns the pace, or why there is none."""
        try:
            few = FewLayers(self._skeleton, getattr(torch, self.experiment.dtype), work.config, work.taught)
            return measured(few, work, self.examples, whole, dry)
        except Exception as error:  # whatever a base of a kind never seen does: a rough time is better than no plan
            why = (str(error).strip() or type(error).__name__).splitlines()[0][:160]
            return f"a rough guess from the speed of one product, since no steps of a few layers could be timed: {why}"

    def _left_out(self, work: Work) -> str:
        left = [
            word
            for word, there in (
                ("torch_compile", work.settings.torch_compile),
                ("quantisation", self.experiment.load_in_4bit or self.experiment.load_in_8bit),
            )
            if there
        ]
        return f"steps were timed without: {', '.join(left)}" if left else ""
