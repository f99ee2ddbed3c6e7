"""Every choice of an experiment as one validated value: YAML first, then `key=value`.

Names are PEFT's and TrainingArguments'. A key may be written with its section (`training.learning_rate`) or alone
(`learning_rate`); common names of LLaMA-Factory, axolotl and ms-swift are read too, and each is echoed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from loramix.data.domains import name_problem
from loramix.errors import ConfigError, LoramixError, Problems, did_you_mean
from loramix.methods import METHODS, method_named
from loramix.settings import AdapterSettings, DataSettings, Experiment
from loramix.training.settings import TrainingSettings

ALIASES = {
    "base_model": "model_name_or_path",
    "model": "model_name_or_path",
    "torch_dtype": "dtype",
    "lora_r": "adapter.r",
    "lora_rank": "adapter.r",
    "lora_target": "adapter.target_modules",
    "lora_target_modules": "adapter.target_modules",
    "cutoff_len": "data.max_length",
    "sequence_len": "data.max_length",
    "max_seq_length": "data.max_length",
    "micro_batch_size": "training.per_device_train_batch_size",
    "batch_size": "training.per_device_train_batch_size",
    "lr": "training.learning_rate",
    "num_epochs": "training.num_train_epochs",
    "eta": "training.routing_cross_entropy",
    "gradient_checkpointing": "training.activation_checkpointing",
}
_SECTIONS: dict[str, tuple[str, ...]] = {
    "data": tuple(DataSettings.model_fields),
    "adapter": tuple(AdapterSettings.model_fields),
    "training": tuple(field.name for field in fields(TrainingSettings)),
}
_STAGES = ("training", "expert_stage", "joint_stage")


@dataclass(frozen=True)
class Loaded:
    """A validated experiment and what was read under another name, to be echoed."""

    experiment: Experiment
    echoes: tuple[str, ...]


def load(path: str | Path, overrides: Sequence[str] = ()) -> Loaded:
    """Returns the experiment of a YAML file with `key=value` overrides.

    Raises:
        ConfigError: with all problems: unreadable file, unknown keys with the nearest known, impossible values,
            contradictions.
    """
    where = Path(path)
    try:
        content = yaml.safe_load(where.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{where}: cannot be read ({error.strerror}). Expected a YAML file.") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{where}: is not YAML. {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{where}: holds {type(content).__name__}, expected keys and values.")
    return build(content, overrides, where=str(where))


def build(content: Mapping[str, Any], overrides: Sequence[str] = (), *, where: str = "the settings") -> Loaded:
    """Returns the experiment of a mapping with `key=value` overrides; raises as `load` does."""
    problems = Problems(where)
    echoes: list[str] = []
    settled: dict[str, Any] = {}
    for key, value in content.items():
        _place(settled, str(key), value, echoes)
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals:
            problems.add(f"{override!r}: expected key=value, for example learning_rate=1e-4.")
            continue
        try:
            _place(settled, key.removeprefix("--"), yaml.safe_load(text), echoes)
        except yaml.YAMLError:
            problems.add(f"{override!r}: the value is not YAML. Put it in quotes.")
    experiment = _validated(settled, problems)
    if experiment is not None:
        for problem in _contradictions(experiment):
            problems.add(problem)
    elif isinstance(settled.get("method"), str) and settled["method"] not in METHODS:
        problems.add(f"method = {settled['method']!r}: no such method.{did_you_mean(settled['method'], METHODS)}")
    problems.raise_as(ConfigError)
    assert experiment is not None
    return Loaded(experiment, tuple(echoes))


def _place(settled: dict[str, Any], key: str, value: Any, echoes: list[str]) -> None:
    """Puts a value where its key belongs: by alias, by its bare name, or by the dotted path it is."""
    key = key.replace("-", "_")
    target = ALIASES.get(key)
    if target is None and "." not in key and key not in Experiment.model_fields:
        homes = [section for section, names in _SECTIONS.items() if key in names]
        target = f"{homes[0]}.{key}" if len(homes) == 1 else None
    if target is not None:
        echoes.append(f"read {key} as {target}")
        key = target
    *path, last = key.split(".")
    inside = settled
    for part in path:
        below = inside.setdefault(part, {})
        if not isinstance(below, dict):
            below = inside[part] = {}
        inside = below
    if isinstance(value, dict) and isinstance(inside.get(last), dict):
        inside[last].update(value)
    else:
        inside[last] = dict(value) if isinstance(value, dict) else value


def _validated(settled: Mapping[str, Any], problems: Problems) -> Experiment | None:
    experiment = None
    try:
        experiment = Experiment.model_validate(settled)
    except ValidationError as error:
        for one in error.errors():
            problems.add(_said(one["loc"], one["type"], one["msg"], one.get("input")))
    numbers = {field.name: type(field.default) for field in fields(TrainingSettings)}
    for stage in _STAGES:
        given = settled.get(stage)
        if not isinstance(given, dict):
            continue
        for key, value in list(given.items()):
            if key not in numbers:
                del given[key]
                problems.add(f"{stage}.{key}: no such setting.{did_you_mean(str(key), numbers)}")
            elif (right := _as_type(value, numbers[key])) is None:
                del given[key]
                problems.add(f"{stage}.{key} = {value!r}: expected a {numbers[key].__name__}.")
            else:
                given[key] = right
    if experiment is not None:
        experiment = experiment.model_copy(update={stage: dict(settled.get(stage) or {}) for stage in _STAGES})
    return experiment


def _as_type(value: Any, wanted: type) -> Any:
    """Returns the value as the wanted type, or None. YAML reads 1e-4 as text, so numbers are read from text too."""
    if wanted is bool or isinstance(value, bool):
        return value if wanted is bool and isinstance(value, bool) else None
    if wanted is str:
        return value if isinstance(value, str) else None
    try:
        right = wanted(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return right if wanted is not int or float(value) == right else None


def _known_at(path: Iterable[Any]) -> list[str]:
    parts = [str(part) for part in path]
    if not parts:
        return [*Experiment.model_fields, *ALIASES, *(name for names in _SECTIONS.values() for name in names)]
    return list(_SECTIONS.get(parts[0], ()))


def _said(location: tuple[int | str, ...], kind: str, message: str, got: Any) -> str:
    key = ".".join(map(str, location))
    if kind == "extra_forbidden":
        return f"{key}: no such setting.{did_you_mean(str(location[-1]), _known_at(location[:-1]))}"
    if kind == "missing":
        return f"{key}: missing. It has no default; set it."
    return f"{key} = {got!r}: {message[0].lower()}{message[1:]}."


def _contradictions(experiment: Experiment) -> list[str]:
    """Returns what is wrong with choices that are each possible but not together."""
    found = []
    data = experiment.data
    try:
        method = method_named(experiment.method)
    except LoramixError as error:
        found.append(str(error))
        method = None
    stages = {"expert_stage": experiment.expert_stage, "joint_stage": experiment.joint_stage}
    for name, stage in stages.items():
        found += [f"{name}: {problem}" for problem in experiment.settings(stage).problems()]
    if method is not None and method.expert_count == "one" and {"single_long", "mixed"} & set(experiment.controls):
        found.append(f"controls: method {method.name} is its own control. Leave single_long and mixed out.")
    found += [f"data.domains: {wrong}" for domain in data.domains if (wrong := name_problem(domain))]
    if not data.domains and data.path is None:
        found.append("data.domains: missing. Name at least one domain and its file, or data.path.")
    if data.path is None:
        found += [f"data.domains.{d}: has no file. Name one." for d, source in data.domains.items() if not source]
    if method is not None and method.expert_count == "one per domain" and data.path is None and len(data.domains) == 1:
        found.append(f"method {method.name} mixes domains, but one is given. Name at least two, or use method lora.")
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
    # An unknown method is reported above; the adapter's own numbers are checked all the same, as if it were LoRA.
    experts = ["one", "two"] if method is not None and method.expert_count == "one per domain" else ["one"]
    try:
        adapter_config(experiment, experts, method=None if method is not None else "lora")
    except LoramixError as error:
        found += [line.strip() for line in str(error).splitlines()[1:]]
    return found


def adapter_config(experiment: Experiment, experts: Sequence[str], method: str | None = None) -> Any:
    """Returns the LoramixConfig of the experiment's adapter for the given experts.

    Args:
        experiment: the settings.
        experts: names, in the order of `domain_ids`.
        method: another method with the same adapter settings (a stage or a control); the experiment's by default.

    Raises:
        ConfigError: the settings do not fit the method.
    """
    from loramix.tuner import LoramixConfig

    settings = dict(experiment.adapter)
    if method is not None and method != experiment.method:
        settings.update(router=None, decision=None)
    return LoramixConfig(
        method=method or experiment.method,
        experts=list(experts),
        **settings,
    )


def as_yaml(experiment: Experiment) -> str:
    """Returns the resolved settings as YAML that `load` reads back to the same value."""
    resolved = experiment.model_dump()
    resolved["training"] = {**asdict(TrainingSettings(seed=experiment.seed)), **experiment.training}
    text: str = yaml.safe_dump(resolved, sort_keys=False, allow_unicode=True)
    return text
