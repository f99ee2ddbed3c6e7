"""Every choice of an experiment as one validated value: YAML first, then `key=value`.

Names are PEFT's and TrainingArguments'. A key may be written with its section (`training.learning_rate`) or alone
(`learning_rate`); common names of LLaMA-Factory, axolotl and ms-swift are read too, and each is echoed.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from loramix.contradictions import contradictions
from loramix.errors import ConfigError, Problems, did_you_mean
from loramix.methods import METHODS
from loramix.settings import AdapterSettings, DataSettings, Experiment, SearchSettings
from loramix.training.settings import TrainingSettings
from loramix.yaml_text import NotReadable, parse_yaml

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
    "eta": "training.losses.routing_cross_entropy",
    "gradient_checkpointing": "training.activation_checkpointing",
    "gradient_checkpointing_kwargs": "training.activation_checkpointing_kwargs",
    "num_local_experts": "adapter.num_experts",
}
_SECTIONS: dict[str, tuple[str, ...]] = {
    "data": tuple(DataSettings.model_fields),
    "adapter": tuple(AdapterSettings.model_fields),
    "training": tuple(field.name for field in fields(TrainingSettings)),
    "search": tuple(SearchSettings.model_fields),
}
_STAGES = ("training", "expert_stage", "joint_stage")


@dataclass(frozen=True)
class Loaded:
    """A validated experiment and what was read under another name, to be echoed."""

    experiment: Experiment
    echoes: tuple[str, ...]


def load(path: str | Path, overrides: Sequence[str] = (), *, with_data: bool = True) -> Loaded:
    """Returns the experiment of a YAML file with `key=value` overrides.

    Args:
        path: the file.
        overrides: texts.
        with_data: whether its data will be read. A mixture composed of adapters has none until it is given some.

    Raises:
        ConfigError: with all problems: unreadable file, unknown keys with the nearest known, impossible values,
            contradictions.
    """
    return build(read_yaml(path), overrides, where=str(path), with_data=with_data)


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Returns the keys and values of a YAML file.

    Raises:
        ConfigError: unreadable, not YAML, or no mapping.
    """
    where = Path(path)
    try:
        content = parse_yaml(where.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{where}: cannot be read ({error.strerror}). Expected a YAML file.") from error
    except (NotReadable, UnicodeDecodeError) as error:
        raise ConfigError(f"{where}: is not YAML that can be read: {error}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{where}: holds {type(content).__name__}, expected keys and values.")
    return content


def build(
    content: Mapping[str, Any], overrides: Sequence[str] = (), *, where: str = "the settings", with_data: bool = True
) -> Loaded:
    """Returns the experiment of a mapping with `key=value` overrides; raises as `load` does."""
    problems = Problems(where)
    echoes: list[str] = []
    settled = settle(content, overrides, problems, echoes)
    experiment = _validated(settled, problems)
    if experiment is not None:
        for problem in contradictions(experiment, with_data=with_data):
            problems.add(problem)
    elif isinstance(settled.get("method"), str) and settled["method"] not in METHODS:
        problems.add(f"method = {settled['method']!r}: no such method.{did_you_mean(settled['method'], METHODS)}")
    problems.raise_as(ConfigError)
    assert experiment is not None
    return Loaded(experiment, tuple(echoes))


def settle(
    content: Mapping[str, Any], overrides: Sequence[str], problems: Problems, echoes: list[str]
) -> dict[str, Any]:
    """Returns a mapping in which every key has its section, the overrides over the rest; nothing is validated yet.

    Args:
        content: keys with their section, alone, dotted, or under another tool's name.
        overrides: `key=value` texts; values are YAML.
        problems: collects overrides that cannot be read.
        echoes: collects what was read under another name.
    """
    settled: dict[str, Any] = {}
    for key, value in copy.deepcopy(dict(content)).items():  # overrides must not reach into what the caller keeps
        _place(settled, str(key), value, echoes)
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals:
            problems.add(f"{override!r}: expected key=value, for example learning_rate=1e-4.")
            continue
        try:
            _place(settled, key.removeprefix("--"), parse_yaml(text), echoes)
        except NotReadable:
            problems.add(f"{override[:80]!r}: the value is not YAML. Put it in quotes.")
    return settled


def _place(settled: dict[str, Any], key: str, value: Any, echoes: list[str]) -> None:
    """Puts a value where its key belongs: by alias, by its bare name, or by the dotted path it is."""
    key = key.replace("-", "_")
    if key == "data" and isinstance(value, str):
        echoes.append(f"read data = {value} as data.root")
        key = "data.root"
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
    defaults = asdict(TrainingSettings())
    numbers = {field.name: type(defaults[field.name]) for field in fields(TrainingSettings)}
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


def typed(stage: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a stage's settings with every value of its right type; what cannot be read is left to `build`."""
    defaults = asdict(TrainingSettings())
    found = {}
    for key, value in stage.items():
        right = _as_type(value, type(defaults[key])) if key in defaults else None
        found[key] = value if right is None else right
    return found


def _as_type(value: Any, wanted: type) -> Any:
    """Returns the value as the wanted type, or None. YAML reads 1e-4 as text, so numbers are read from text too."""
    if wanted is bool or isinstance(value, bool):
        return value if wanted is bool and isinstance(value, bool) else None
    if wanted is str:
        return value if isinstance(value, str) else None
    if wanted is dict:
        return {k: _number(v) for k, v in value.items()} if isinstance(value, dict) else None
    try:
        right = wanted(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return right if wanted is not int or float(value) == right else None


def _number(value: Any) -> Any:
    """Returns the number a text stands for (YAML reads 1e-4 as text), or the value as it is."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


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


def as_yaml(experiment: Experiment) -> str:
    """Returns the settings as YAML, defaults written out; `load` reads back what means the same."""
    resolved = experiment.model_dump()
    resolved["training"] = {**asdict(TrainingSettings(seed=experiment.seed)), **experiment.training}
    text: str = yaml.safe_dump(resolved, sort_keys=False, allow_unicode=True)
    return text
