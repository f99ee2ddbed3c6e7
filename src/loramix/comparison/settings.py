"""The choices of a comparison: rows of methods over one set of data, settings and seeds, as one validated value."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from loramix.errors import ConfigError, Problems, did_you_mean
from loramix.experiment import build, read_yaml, settle, typed
from loramix.methods import METHODS
from loramix.settings import BUILTIN, Experiment

Setting = Literal["single", "mixture"]
BASE = "base"
"""The row of the bare base."""
LONGER = "lora-long"
"""The row of each domain's LoRA trained on for as long as a mixture's second stage."""
_ROW_KEYS = ("method", "settings")


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class JudgeSettings(_Section):
    """A language model that scores answers, behind an OpenAI-compatible endpoint; see docs/metrics.md."""

    model: str
    base_url: str | None = None
    """By default OPENAI_BASE_URL; without either nothing is asked."""
    input_price: float = Field(0.0, ge=0)
    output_price: float = Field(0.0, ge=0)
    """Per million tokens, in whatever currency the bill has."""


class MeasureSettings(_Section):
    """What is measured of every cell beside perplexity, and letter choices where examples have options."""

    answers: int = Field(0, ge=0)
    """Held-out examples of each domain that are answered by generation; 0 leaves text metrics out."""
    max_new_tokens: int = Field(64, ge=1)
    text: list[Literal["bleu", "rouge_l", "glm_bleu_4", "glm_rouge_l"]] = Field(default=["bleu", "rouge_l"])
    languages: dict[str, str] = Field(default_factory=dict)
    """Domain -> "en" or "zh", for the tokenizer of text metrics; found from the references where it is left out."""
    exact_number: list[str] = Field(default_factory=list)
    """Domains whose answers end in a number that must be right (GSM8K)."""
    choice_by_generation: bool = False
    """Whether options are also read out of generated answers."""
    batch_size: int = Field(8, ge=1)
    resamples: int = Field(1000, ge=100)
    """Bootstrap resamples of every interval."""
    classifier: str | None = "tf-idf"
    """What the routers are compared with: "tf-idf", the folder of a sentence encoder, or nothing."""
    judge: JudgeSettings | None = None


class Shared(_Section):
    """What belongs to the comparison itself; everything else in its file are settings of an experiment."""

    output_dir: str
    cells: str | None = None
    """Folder of the trained and measured cells, by default OUT/cells. Comparisons that share it share what they have in
    common, also at the same time."""
    title: str = "Comparison"
    bases: list[str] = Field(default_factory=list)
    seeds: list[int] = Field(default=[0], min_length=1)
    settings: list[Setting] = Field(default=["mixture"], min_length=1)
    methods: dict[str, dict[str, Any] | None] = Field(min_length=1)
    measure: MeasureSettings = Field(default_factory=lambda: MeasureSettings.model_validate({}))
    against: str | None = None
    """The row id that all others are tested against, "lora/mixture" for example; by default the first mixture."""


@dataclass(frozen=True)
class Row:
    """One line of the table: a label, its method and the experiment it stands for (of the first base and seed).

    `own_stages` is the experiment's settings with both stages, for a row that is no two-stage method but trains as
    long as one."""

    label: str
    method: str
    settings: tuple[Literal["single", "mixture", "none"], ...]
    experiment: Experiment
    stages: tuple[dict[str, Any], dict[str, Any]]
    """Training settings of stage 1 and of stage 2, from which lengths are counted."""


@dataclass(frozen=True)
class Comparison:
    """All choices of a comparison."""

    shared: Shared
    rows: tuple[Row, ...]

    @property
    def cells(self) -> Path:
        """The folder of all cells."""
        return Path(self.shared.cells or Path(self.shared.output_dir) / "cells")

    @property
    def bases(self) -> list[str]:
        return self.shared.bases

    @property
    def two_stages(self) -> bool:
        """Whether some row trains experts first, so that every mixture trains as long as both stages."""
        return any(row.method == LONGER or _starts_from_experts(row.method) for row in self.rows)

    def resolved(self) -> dict[str, Any]:
        """Returns what was settled, for the results file: the shared part, and each row's experiment."""
        rows = {
            row.label: {"method": row.method, "settings": list(row.settings), **_telling(row.experiment)}
            for row in self.rows
        }
        return {**self.shared.model_dump(exclude={"output_dir", "cells", "methods"}), "methods": rows}


def _telling(experiment: Experiment) -> dict[str, Any]:
    """Returns an experiment's settings without what the comparison overrides, and without where files lie."""
    kept: dict[str, Any] = experiment.model_dump(
        exclude={"output_dir", "controls", "seed", "model_name_or_path", "method"}, exclude_defaults=True
    )
    kept.get("data", {}).pop("root", None)
    return kept


def _starts_from_experts(method: str) -> bool:
    return method in METHODS and METHODS[method].starts_from_experts


@dataclass(frozen=True)
class LoadedComparison:
    """A validated comparison and what was read under another name, to be echoed."""

    comparison: Comparison
    echoes: tuple[str, ...]


def load_comparison(path: str | Path, overrides: Sequence[str] = ()) -> LoadedComparison:
    """Returns the comparison of a YAML file with `key=value` overrides.

    Raises:
        ConfigError: all problems of the file and of every row together.
    """
    return build_comparison(_read(Path(path)), overrides, where=str(path))


def _read(path: Path, below: tuple[Path, ...] = ()) -> dict[str, Any]:
    """Returns a file's content over that of the file it extends, if any; `methods` are replaced as a whole."""
    content = read_yaml(path)
    extended = content.pop("extends", None)
    if extended is None:
        return content
    parent = (path.parent / str(extended)).resolve()
    if parent in below or parent == path.resolve():
        raise ConfigError(f"{path}: extends itself, by way of {extended}. Remove one `extends`.")
    found = _read(parent, (*below, path.resolve()))
    if "methods" in content:
        found.pop("methods", None)
    return _merged(found, content)


def build_comparison(
    content: Mapping[str, Any], overrides: Sequence[str] = (), *, where: str = "the settings"
) -> LoadedComparison:
    """Returns the comparison of a mapping; raises as `load_comparison` does."""
    problems = Problems(where)
    echoes: list[str] = []
    content = dict(content)
    if isinstance(content.get("methods"), list):
        content["methods"] = dict.fromkeys(map(str, content["methods"]))
    settled = settle(content, overrides, problems, echoes)
    shared = _shared(settled, problems)
    problems.raise_as(ConfigError)
    assert shared is not None
    common = {key: value for key, value in settled.items() if key not in Shared.model_fields}
    common["model_name_or_path"] = shared.bases[0]
    rows, found = [], []
    for label, given in shared.methods.items():
        row, wrong = _row(label, given or {}, common, shared)
        rows += [row] if row is not None else []
        found.append((label, wrong))
    _tell(found, problems)
    problems.raise_as(ConfigError)
    comparison = Comparison(shared, tuple(rows))
    _check_against(comparison, problems)
    problems.raise_as(ConfigError)
    return LoadedComparison(comparison, tuple(dict.fromkeys(echoes)))


def _shared(settled: dict[str, Any], problems: Problems) -> Shared | None:
    given = {key: value for key, value in settled.items() if key in Shared.model_fields}
    for key in ("method", "controls", "seed"):
        if key in settled:
            instead = {"method": "methods", "controls": f"the rows {BASE}, lora and {LONGER} of methods"}
            problems.add(f"{key}: a comparison has none. Use {instead.get(key, 'seeds')}.")
    base = settled.pop("model_name_or_path", None)
    given["bases"] = given.get("bases") or [base or BUILTIN]
    if isinstance(given.get("methods"), dict):
        given["methods"] = {str(label): row for label, row in given["methods"].items()}
    try:
        return Shared.model_validate(given)
    except ValidationError as error:
        for one in error.errors():
            key = ".".join(map(str, one["loc"]))
            if one["type"] == "extra_forbidden":
                problems.add(
                    f"{key}: no such setting.{did_you_mean(str(one['loc'][-1]), MeasureSettings.model_fields)}"
                )
            else:
                message = one["msg"]
                problems.add(f"{key} = {one.get('input')!r:.80}: {message[0].lower()}{message[1:]}.")
    return None


def _row(label: str, given: dict[str, Any], common: dict[str, Any], shared: Shared) -> tuple[Row | None, list[str]]:
    """Returns the row, and what is wrong with it."""
    problems = Problems(label)
    own = settle({key: value for key, value in given.items() if key not in _ROW_KEYS}, (), problems, [])
    method = str(given.get("method", label))
    if method not in (BASE, LONGER) and method not in METHODS:
        known = [BASE, LONGER, *METHODS]
        return None, [f"method = {method!r}: no such method.{did_you_mean(method, known)} Known: {', '.join(known)}."]
    settings, wrong = _row_settings(method, given.get("settings"), shared)
    stages = tuple(
        typed({**common.get("training", {}), **common.get(stage, {}), **own.get("training", {}), **own.get(stage, {})})
        for stage in ("expert_stage", "joint_stage")
    )
    mapping = _merged(common, own)
    mapping.update(method="lora" if method in (BASE, LONGER) else method, output_dir=shared.output_dir)
    if method == BASE or METHODS[mapping["method"]].tuner != "loramix":
        mapping["adapter"] = own.get("adapter", {})
    if not _starts_from_experts(method):
        mapping["training"] = stages[0]
        mapping.pop("expert_stage", None)
        mapping.pop("joint_stage", None)
    try:
        experiment = build(mapping, where=label).experiment
    except ConfigError as error:
        return None, wrong + [line.strip() for line in str(error).splitlines()[1:]]
    return Row(label, method, settings, experiment, (stages[0], stages[1])), wrong


def _row_settings(
    method: str, asked: Any, shared: Shared
) -> tuple[tuple[Literal["single", "mixture", "none"], ...], list[str]]:
    """Returns the settings a row is run in: by default the comparison's, as far as the method can."""
    if method == BASE:
        return ("none",), []
    can: tuple[Setting, ...] = ("single", "mixture")
    if method == LONGER:
        can = ("single",)
    elif METHODS[method].expert_count == "one per domain" or METHODS[method].settled_by == "domain":
        can = ("mixture",)
    if asked is None:
        wanted = can if method in ("lora", LONGER) else tuple(s for s in shared.settings if s in can) or can
        return wanted, []
    wanted = tuple(asked) if isinstance(asked, list) else (asked,)
    wrong = [f"settings: {method} can be run as {' and '.join(can)}, not as {s!r}." for s in wanted if s not in can]
    return tuple(s for s in wanted if s in can), wrong


def _merged(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a new nested mapping, the second over the first."""
    merged = dict(below)
    for key, value in above.items():
        under = merged.get(key)
        merged[key] = _merged(under, value) if isinstance(under, Mapping) and isinstance(value, Mapping) else value
    return merged


def _tell(found: list[tuple[str, list[str]]], problems: Problems) -> None:
    """Says what every row has wrong once, and the rest by row."""
    everywhere = set.intersection(*(set(wrong) for _, wrong in found)) if len(found) > 1 else set()
    for problem in dict.fromkeys(problem for _, wrong in found for problem in wrong):
        rows = [label for label, wrong in found if problem in wrong]
        problems.add(problem if problem in everywhere else f"methods.{', '.join(rows)}: {problem}")


def _check_against(comparison: Comparison, problems: Problems) -> None:
    ids = [
        f"{row.label}/{setting}" if setting != "none" else row.label
        for row in comparison.rows
        for setting in row.settings
    ]
    against = comparison.shared.against
    if against is not None and against not in ids:
        problems.add(
            f"against = {against!r}: no such row.{did_you_mean(against, ids)} Expected one of {', '.join(ids)}."
        )
