"""How long a stage takes: by the pace of its steps, each kind measured once; roughly, where none can be measured."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from loramix.data.collation import Example
from loramix.models import load_skeleton
from loramix.planning.dry_run import DryRun
from loramix.planning.few_layers import FewLayers
from loramix.planning.kept_random import kept_random
from loramix.planning.pace import Pace, measured
from loramix.planning.product_speed import EFFICIENCY, gemm_rate
from loramix.settings import Experiment
from loramix.training.settings import TrainingSettings

OF_A_STEP = (
    "per_device_train_batch_size",
    "max_grad_norm",
    "padding_free",
    "tokens_at_once",
    "shared_inputs",
    "lean_norms",
    "lean_activations",
    "bf16",
    "head_chunk",
    "activation_checkpointing",
    "activation_checkpointing_kwargs",
)
"""Settings that a step's time depends on."""


@dataclass(frozen=True)
class Work:
    """What a stage trains: the adapter's config, its settings, auxiliary losses with their weights, whether routers
    learn, and whether prompts are read before it."""

    config: Any
    settings: TrainingSettings
    losses: Mapping[str, float]
    taught: bool = False
    ahead: bool = False

    def kind(self) -> str:
        """Returns a word that works of the same pace share: names of experts and lengths of training do not matter."""
        adapter = {**self.config.to_dict(), "experts": len(self.config.experts), "domains": None, "decision": None}
        for name in ("target_modules", "exclude_modules"):
            if isinstance(adapter[name], set):
                adapter[name] = sorted(adapter[name])
        steps = {name: getattr(self.settings, name) for name in OF_A_STEP}
        return repr((sorted(adapter.items()), steps, sorted(self.losses.items()), self.taught, self.ahead))


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
    """Tells how long works of an experiment take on this machine, as it is when nothing else runs on it.

    Args:
        experiment: the settings.
        examples: that its stages learn.
    """

    def __init__(self, experiment: Experiment, examples: Sequence[Example]) -> None:
        self.experiment, self.examples = experiment, examples
        config: Any = load_skeleton(experiment.model_name_or_path).config.get_text_config()
        self.layers: int = config.num_hidden_layers
        self._known: dict[str, Pace | str] = {}
        self._rate = 0.0

    def seconds(
        self, work: Work, amount: Amount, whole: DryRun, dry: Callable[[Any], DryRun], in_dry: int
    ) -> tuple[float, str]:
        """Returns the seconds of a work, and a note about them: "" where there is none.

        Args:
            work: what is trained.
            amount: how much.
            whole: the whole model's dry run.
            dry: the same of another model.
            in_dry: tokens of a dry run.
        """
        kind = work.kind()
        if kind not in self._known:
            self._known[kind] = self._measured(work, whole, dry, in_dry)
        pace, flops = self._known[kind], whole.flops / in_dry
        if isinstance(pace, Pace):
            updates = amount.steps * whole.trained
            return pace.seconds(flops, amount.tokens, amount.learned, updates, amount.once), self._left_out(work)
        if not self._rate:
            self._rate = gemm_rate(self.experiment) * EFFICIENCY
        return (flops * amount.tokens + amount.once) / self._rate, pace

    def _measured(self, work: Work, whole: DryRun, dry: Callable[[Any], DryRun], in_dry: int) -> Pace | str:
        """Returns the pace, or why there is none."""
        try:
            few = FewLayers(self.experiment, work.config, self.layers, work.taught)
            with kept_random():
                return measured(few, work.settings, self.examples, work.losses, work.ahead, whole, dry, in_dry)
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
