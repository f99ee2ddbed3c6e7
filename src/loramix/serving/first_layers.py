"""Routing in front of an engine that knows nothing of it: the first layers of the base read the prompt, and a router
says which expert answers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from loramix.errors import ConfigError
from loramix.models.targets import layer_of
from loramix.tuner.abstaining import calibration_of
from loramix.tuner.decisions import last_scope_needed
from loramix.tuner.model import LoramixModel

WITHIN = 0.001
"""How far below the best layer's accuracy the chosen one may be: 0.1 point."""


def earliest_layer(accuracy: Mapping[str, float]) -> str | None:
    """Returns the decision that asks the earliest router that is as good as the best, "layer:k", or None if nothing was
    measured.

    Args:
        accuracy: scope -> share of held-out prompts that its router sends to their label, in forward order (a run's
            `router_accuracy_by_layer`).
    """
    if not accuracy:
        return None
    best = max(accuracy.values())
    scope = next(scope for scope, share in accuracy.items() if share >= best - WITHIN - 1e-9)
    return f"layer:{scope.rpartition('.')[2]}"


def keep_first_layers(model: Any, decision: str) -> int:
    """Drops the layers that neither a decision nor the calibration reads, so that their weights take no memory; returns
    how many stay.

    Args:
        model: a mixture whose routers read the base.
        decision: "layer:k".

    Raises:
        ConfigError: the routers read the running model.
    """
    tuner: LoramixModel = model.base_model
    mixture = tuner.guide.active()
    if mixture is None or not mixture.reads_base:
        raise ConfigError(
            "the routers of this run read the running model, layer by layer with the experts in it; in front of vLLM "
            "only the base reads the prompt. Train with router.reads = base, or use --engine transformers."
        )
    needed = last_scope_needed(decision, mixture.scopes)
    if (calibrated := calibration_of(mixture, None)) is not None:  # it may read on, to tell what fits no expert
        needed = max(needed, calibrated.layer, key=mixture.scopes.index)
    last = int(needed.rpartition(".")[2])
    dropped = [
        (stack, place)
        for name, stack in tuner.model.named_modules()
        if isinstance(stack, nn.ModuleList)
        for place in range(last + 1, len(stack))
        if layer_of(f"{name}.{place}.") == f"{name.rpartition('.')[2]}.{place}"
    ]
    for stack, place in dropped:
        stack[place] = nn.Identity()
    return last + 1
