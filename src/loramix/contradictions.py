"""What is wrong with choices that are each possible but not together; all of it, before a model is loaded."""

from __future__ import annotations

from typing import Any

from loramix.adapter_settings import adapter_config
from loramix.data.domains import name_problem
from loramix.errors import LoramixError, did_you_mean
from loramix.experts import allocation_problem, experts_per_layer
from loramix.losses import AUXILIARY
from loramix.methods import method_named
from loramix.methods.base import Method
from loramix.models import layers_of
from loramix.settings import Experiment


def contradictions(experiment: Experiment, *, with_data: bool = True) -> list[str]:
    """Returns what is wrong with choices that are each possible but not together.

    Args:
        experiment: the choices.
        with_data: whether its data will be read, so that every domain must have a file.
    """
    try:
        method: Method | None = method_named(experiment.method)
        found = []
    except LoramixError as error:
        method, found = None, [str(error)]
    found += _stage_problems(experiment, method)
    if method is not None:
        found += _against_method(experiment, method)
    found += _base_problems(experiment, method)
    found += _data_contradictions(experiment)
    if with_data:
        found += _missing_files(experiment)
    # An unknown method is reported above; the adapter's own numbers are checked all the same, as if it were LoRA.
    loramix_adapter = method is not None and method.tuner == "loramix"
    try:
        adapter_config(experiment, list(experiment.data.domains) or ["one", "two"], None if loramix_adapter else "lora")
    except LoramixError as error:
        found += [line.strip() for line in str(error).splitlines()[1:]]
    return found


def _stage_problems(experiment: Experiment, method: Method | None) -> list[str]:
    """Returns what is wrong with the settings of the stages; what both have wrong is said once, of `training`."""
    by_stage = {}
    for name in ("expert_stage", "joint_stage"):
        settings = experiment.settings(getattr(experiment, name))
        by_stage[name] = settings.problems()
        if method is None:
            continue
        if method.tuner == "prefix" and settings.activation_checkpointing:
            by_stage[name].append(
                "activation_checkpointing: PEFT's prefix tuning does not work with it (a layer that runs again would "
                "lengthen the cache again). Leave it out."
            )
        if name == "joint_stage" and method.settled_by == "prompt" and settings.torch_compile:
            by_stage[name].append(
                f"torch_compile: method {method.name} lets the base read the prompts inside a training forward, which "
                "falls into dozens of pieces that are compiled again and again. Leave it out; expert_stage may have it."
            )
        possible = ", ".join(sorted(method.possible_losses)) or "none"
        by_stage[name] += [
            f"losses.{loss}: method {method.name} has nothing to apply it to. Possible: {possible}."
            for loss in settings.losses
            if loss in AUXILIARY and loss not in method.possible_losses
        ]
    first, second = by_stage["expert_stage"], by_stage["joint_stage"]
    found = [f"training: {problem}" for problem in first if problem in second]
    found += [f"expert_stage: {problem}" for problem in first if problem not in second]
    found += [f"joint_stage: {problem}" for problem in second if problem not in first]
    if method is not None and experiment.expert_stage and not method.starts_from_experts and method.name != "lora":
        found.append(f"expert_stage: method {method.name} trains no expert alone. Set training or joint_stage.")
    if method is not None and experiment.experts_together and not method.starts_from_experts:
        found.append(f"experts_together: method {method.name} trains no expert alone. Leave it out.")
    elif experiment.experts_together and experiment.settings(experiment.expert_stage).torch_compile:
        found.append("experts_together and torch_compile of the expert stage are both set. Leave one out.")
    if method is not None and experiment.joint_stage and method.expert_count == "one":
        found.append(f"joint_stage: method {method.name} has one stage. Set training.")
    return found


def _base_problems(experiment: Experiment, method: Method | None) -> list[str]:
    """Returns what is wrong with the form the base is to be loaded in."""
    found = []
    few = [name for name in ("load_in_4bit", "load_in_8bit") if getattr(experiment, name)]
    if len(few) > 1:
        found.append("load_in_4bit and load_in_8bit are both set. Leave one out.")
    if few and experiment.fsdp:
        found.append(f"fsdp and {few[0]} are both set: a quantised base cannot be dealt out. Leave one out.")
    if experiment.dp_replicate_size > 1 and not experiment.fsdp:
        found.append(
            f"dp_replicate_size = {experiment.dp_replicate_size} has no effect without fsdp. Set fsdp to true."
        )
    if method is not None and method.tuner == "none":
        found += [
            f"{name}: method {method.name} trains the base itself, which must be whole and unquantised in each "
            "process. Leave it out."
            for name in [*few, *["fsdp"] * experiment.fsdp]
        ]
    return found


def _against_method(experiment: Experiment, method: Method) -> list[str]:
    found = []
    data, adapter = experiment.data, experiment.adapter
    trained = [control for control in experiment.controls if control != "base"]
    if method.expert_count == "one" and trained:
        found.append(f"controls: method {method.name} is its own control. Leave {' and '.join(trained)} out.")
    if "single_long" in experiment.controls and not method.starts_from_experts and method.expert_count != "one":
        found.append(
            f"controls: method {method.name} trains no expert alone, so there is no single_long. Leave it out."
        )
    elif "single_long" in experiment.controls and not method.stages[-1].takes_steps:
        found.append(
            f"controls: the last stage of method {method.name} takes no training steps, so single_long has no length. "
            "Leave it out."
        )
    alone = data.path is None and len(data.domains) == 1
    if method.expert_count == "one per domain" and alone:
        found.append(f"method {method.name} mixes domains, but one is given. Name at least two, or use method lora.")
    if adapter.num_virtual_tokens is not None and method.tuner != "prefix":
        found.append(f"adapter.num_virtual_tokens: method {method.name} has none (prefix has). Leave it out.")
    if method.tuner != "loramix":
        given = {key for key, value in adapter.model_dump(exclude_defaults=True).items() if value is not None}
        for key in sorted(given - {"num_virtual_tokens"}):
            found.append(f"adapter.{key}: method {method.name} has no LoRA experts. Leave it out.")
    if method.stages[-1].search is None and experiment.search.model_dump(exclude_none=True):
        found.append(f"search: method {method.name} trains by gradients. Leave it out (lorahub searches).")
    layers = layers_of(experiment.model_name_or_path)
    if layers is not None and allocation_problem(adapter.allocation) is None:
        try:
            experts_per_layer(adapter.allocation, 1, layers)
        except ValueError as error:
            found.append(f"adapter.{error}")
    if data.kinds is not None and not {"localized_balance", "localized_balance_cv"} & method.possible_losses:
        found.append(
            f"data.kinds: method {method.name} does not tell kinds of data apart (loramoe does). Leave it out."
        )
    return found


def _data_contradictions(experiment: Experiment) -> list[str]:
    found = []
    data = experiment.data
    found += [f"data.domains: {wrong}" for domain in data.domains if (wrong := name_problem(domain))]
    found += [f"data.unseen: {wrong}" for domain in data.unseen if (wrong := name_problem(domain))]
    found += [f"data.unseen: {d} is a domain too. Give it another name." for d in data.unseen if d in data.domains]
    found += [
        f"data.split_in.{domain} = {parts}: expected a domain and a number from 2."
        for domain, parts in data.split_in.items()
        if parts < 2 or (data.path is None and domain not in data.domains)
    ]
    if (data.label_noise or data.missing_labels) and data.path is None and len(data.domains) == 1:
        found.append(
            "data.label_noise, data.missing_labels: there is one domain, so no label can be wrong. Leave it out."
        )
    if data.split_in and data.mixing == "weights":
        found.append("data.split_in: with data.mixing = weights the parts have no weights. Use another mixing.")
    for name in ("max_train_examples", "max_test_examples"):
        known = None if data.path is not None else {*data.domains, *data.unseen}
        found += _limit_problems(name, getattr(data, name), known)
    if data.mixing == "weights" and set(data.mixing_weights or {}) != set(data.domains):
        found.append(
            f"data.mixing_weights names {sorted(data.mixing_weights or {})}, expected the "
            f"domains {sorted(data.domains)}."
        )
    weights = (data.mixing_weights or {}).values()
    if data.mixing == "weights" and weights and (min(weights) < 0 or sum(weights) <= 0):
        found.append(f"data.mixing_weights = {data.mixing_weights}: expected 0 or more each, and more than 0 together.")
    if data.mixing != "weights" and data.mixing_weights is not None:
        found.append(f"data.mixing_weights is set, but data.mixing = {data.mixing!r}. Set data.mixing to weights.")
    if data.kinds is not None and data.domains and set(data.kinds) != set(data.domains):
        found.append(f"data.kinds names {sorted(data.kinds)}, expected the domains {sorted(data.domains)}.")
    return found


def _missing_files(experiment: Experiment) -> list[str]:
    data = experiment.data
    if data.path is not None:
        return []
    if not data.domains:
        return ["data.domains: missing. Name at least one domain and its file, or data.path."]
    return [f"data.domains.{d}: has no file. Name one." for d, source in data.domains.items() if not source]


def _limit_problems(name: str, most: Any, known: set[str] | None) -> list[str]:
    """Returns what is wrong with a limit of examples, one for all domains or one by domain (of those known, if so)."""
    by_domain = most if isinstance(most, dict) else {} if most is None else {"": most}
    found = [
        f"data.{name}{f'.{domain}' * bool(domain)} = {number}: expected at least 1."
        for domain, number in by_domain.items()
        if number < 1
    ]
    unknown = [] if known is None else sorted(set(by_domain) - known - {""})
    return found + [f"data.{name}.{d}: no such domain.{did_you_mean(d, known or ())}" for d in unknown]
