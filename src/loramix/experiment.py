"""Every choice of an experiment as one validated value: YAML first, then `key=value`.

Names are PEFT's and TrainingArguments'. A key may be written with its section (`training.learning_rate`) or alone
(`learning_rate`); common names of LLaMA-Factory, axolotl and ms-swift are read too, and each is echoed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from loramix.errors import ConfigError, LoramixError, Problems, did_you_mean
from loramix.training.settings import TrainingSettings

BUILTIN = "smollm2-135m-instruct"


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class DataSettings(_Section):
    """Which examples are learned and measured."""

    domains: dict[str, str | None] = Field(default_factory=dict)
    """Domain -> file, folder with train and test files, or Hub name. With `path`: the labels allowed (values empty)."""
    path: str | None = None
    """One source whose rows carry their own label, instead of one source for each domain."""
    domain_column: str | None = None
    """Its column with the label; by default domain, task, channel or task_id."""
    test_fraction: float = Field(0.1, gt=0, lt=1)
    max_train_examples: int | None = Field(None, ge=1)
    max_test_examples: int | None = Field(None, ge=1)
    max_length: int = Field(512, ge=8)
    truncation: Literal["error", "drop", "left", "right"] = "right"
    loss_on: Literal["response", "all"] = "response"
    mixing: Literal["proportional", "uniform", "temperature", "weights"] = "proportional"
    mixing_temperature: float = Field(2.0, gt=0)
    mixing_weights: dict[str, float] | None = None


class AdapterSettings(_Section):
    """The adapter, in PEFT's words; see LoramixConfig."""

    r: int = 8
    lora_alpha: int = 16
    lora_dropout: float = 0.0
    use_rslora: bool = False
    target_modules: list[str] | str = "all-linear"
    exclude_modules: list[str] | str | None = None
    layers_to_transform: list[int] | None = None
    router: dict[str, Any] | None = None
    decision: str | None = None
    backend: str = "auto"


class Experiment(_Section):
    """All choices of one run."""

    output_dir: str
    model_name_or_path: str = BUILTIN
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    method: str = "moa"
    seed: int = 0
    data: DataSettings
    adapter: AdapterSettings = AdapterSettings()
    training: dict[str, Any] = Field(default_factory=dict)
    """Settings of every stage; see TrainingSettings."""
    expert_stage: dict[str, Any] = Field(default_factory=dict)
    """Settings of stage 1 that differ from `training`."""
    joint_stage: dict[str, Any] = Field(default_factory=dict)
    """Settings of stage 2 that differ from `training`."""
    controls: list[Literal["base", "single_long", "mixed"]] = Field(default_factory=list)
    """What is measured beside the method, to compare: the bare base, each single LoRA trained on for as long as stage
    2, one LoRA trained on all domains for as long as both stages together."""

    def settings(self, stage: Mapping[str, Any]) -> TrainingSettings:
        """Returns the training settings of a stage, its own over the common ones."""
        return replace(TrainingSettings(seed=self.seed), **{**self.training, **stage})


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
        for key, value in given.items():
            if key not in numbers:
                problems.add(f"{stage}.{key}: no such setting.{did_you_mean(str(key), numbers)}")
            elif (right := _as_type(value, numbers[key])) is None:
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
    try:
        right = wanted(value)
    except (TypeError, ValueError):
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
    from loramix.methods import method_named

    found = []
    data = experiment.data
    try:
        method = method_named(experiment.method)
    except LoramixError as error:
        found.append(str(error))
        method = None
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
