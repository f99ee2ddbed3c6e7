"""From an experiment's adapter section to the LoramixConfig of one of its adapters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from loramix.methods import METHODS, method_named
from loramix.settings import Experiment


def adapter_config(
    experiment: Experiment, domains: Sequence[str], method: str | None = None, expert: str = "mixed"
) -> Any:
    """Returns the LoramixConfig of the experiment's adapter.

    Args:
        experiment: the settings.
        domains: names, in the order of `domain_ids`.
        method: another method with the same rank, scaling and targets (a stage or a control); the experiment's by
            default.
        expert: the name of the one expert, for a method that has one.

    Raises:
        ConfigError: the settings do not fit the method.
    """
    from loramix.tuner import LoramixConfig

    settings = experiment.adapter.model_dump(exclude={"num_virtual_tokens"})
    asked = method_named(method or experiment.method)
    if asked.name != experiment.method:
        for name in ("router", "scope", "decision", "bank", "allocation", "num_experts"):
            settings[name] = None
        own = METHODS[experiment.method].defaults if experiment.method in METHODS else {}
        for name in ("r", "lora_alpha", "lora_dropout", "target_modules"):
            settings[name] = own.get(name) if settings[name] is None else settings[name]
        if settings["backend"] != "loop":
            settings["backend"] = "auto"
    names = {"one": [expert], "one per domain": list(domains)}.get(asked.expert_count)
    told = asked.settled_by == "domain"
    return LoramixConfig(method=asked.name, experts=names, domains=list(domains) if told else None, **settings)


def together_config(experiment: Experiment, domains: Sequence[str]) -> Any:
    """Returns the LoramixConfig under which stage 1 trains the experts of all domains in one batch: those that
    `adapter_config` gives for each alone, beside each other. Routers must be there, but nothing is asked of them: the
    label names each row's expert.

    Args:
        experiment: the settings.
        domains: names, in the order of `domain_ids`.

    Raises:
        ConfigError: the settings do not fit an expert.
    """
    from loramix.tuner import LoramixConfig

    alone = adapter_config(experiment, domains, "lora", domains[0])
    same = ("r", "lora_alpha", "lora_dropout", "use_rslora", "target_modules", "exclude_modules", "layers_to_transform")
    given = {name: getattr(alone, name) for name in (*same, "backend")}
    return LoramixConfig(method="moa", experts=list(domains), router={"reads": "experts"}, **given)
