"""What a stage trains, as far as the time of its steps goes by it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

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
