"""The choices of a comparison: rows of methods over one set of data, settings and seeds, as one validated value."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from loramix.comparison.rows import ALONE, BASE, LONGER, Row, Setting, merged, row_of
from loramix.errors import ConfigError, Problems, did_you_mean
from loramix.experiment import read_yaml, settle
from loramix.settings import BUILTIN, Experiment


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
    languages: dict[str, Literal["en", "zh"]] = Field(default_factory=dict)
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
    if isinstance(content.get("methods"), list):
        content["methods"] = dict.fromkeys(map(str, content["methods"]))
    if extended is None:
        return content
    parent = (path.parent / str(extended)).resolve()
    if parent in below or parent == path.resolve():
        raise ConfigError(f"{path}: extends itself, by way of {extended}. Remove one `extends`.")
    found = _read(parent, (*below, path.resolve()))
    if "methods" in content:
        found.pop("methods", None)
    # Each file by itself: a bare key of the parent must not beat the same key in its section here.
    problems = Problems(str(path))
    settled = merged(settle(found, (), problems, []), settle(content, (), problems, []))
    problems.raise_as(ConfigError)
    return settled


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
    if isinstance(settled.get("methods"), list):  # methods=[lora,moa] takes these of the file's rows, or plain methods
        have = content.get("methods") or {}
        settled["methods"] = {str(label): have.get(str(label)) for label in settled["methods"]}
    shared = _shared(settled, problems)
    problems.raise_as(ConfigError)
    assert shared is not None
    common = {key: value for key, value in settled.items() if key not in Shared.model_fields}
    common["model_name_or_path"] = shared.bases[0]
    rows, found = [], []
    for label, given in shared.methods.items():
        row, wrong = row_of(label, given or {}, common, shared.settings, shared.output_dir)
        rows += [row] if row is not None else []
        found.append((label, wrong))
    _tell(found, problems)
    problems.raise_as(ConfigError)
    comparison = Comparison(shared, tuple(rows))
    _check_names(comparison, problems)
    problems.raise_as(ConfigError)
    return LoadedComparison(comparison, tuple(dict.fromkeys(echoes)))


def _shared(settled: dict[str, Any], problems: Problems) -> Shared | None:
    given = {key: value for key, value in settled.items() if key in Shared.model_fields}
    for key in ("method", "controls", "seed"):
        if key in settled:
            instead = {"method": "methods", "controls": f"the rows {BASE}, lora and {LONGER} of methods"}
            problems.add(f"{key}: a comparison has none. Use {instead.get(key, 'seeds')}.")
    if settled.pop("experts_together", False):
        problems.add(ALONE)
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


def _tell(found: list[tuple[str, list[str]]], problems: Problems) -> None:
    """Says what every row has wrong once, and the rest by row."""
    everywhere = set.intersection(*(set(wrong) for _, wrong in found)) if len(found) > 1 else set()
    for problem in dict.fromkeys(problem for _, wrong in found for problem in wrong):
        rows = [label for label, wrong in found if problem in wrong]
        problems.add(problem if problem in everywhere else f"methods.{', '.join(rows)}: {problem}")


def _check_names(comparison: Comparison, problems: Problems) -> None:
    """Collects names that nothing has: the row others are tested against, domains of what is measured."""
    ids = [name for row in comparison.rows for name in row.ids]
    against = comparison.shared.against
    if against is not None and against not in ids:
        problems.add(
            f"against = {against!r}: no such row.{did_you_mean(against, ids)} Expected one of {', '.join(ids)}."
        )
    data = [row.experiment.data for row in comparison.rows]
    domains = {name for one in data for name in (*one.domains, *one.unseen)}
    measure = comparison.shared.measure
    if all(one.path is None for one in data):
        for key, named in (("languages", list(measure.languages)), ("exact_number", measure.exact_number)):
            for name in named:
                if name not in domains:
                    problems.add(f"measure.{key}: {name!r} is no domain.{did_you_mean(name, domains)}")
    if measure.exact_number and not measure.answers:
        problems.add("measure.exact_number is set, but measure.answers = 0, so nothing is answered. Set answers.")
    short = [base.rstrip("/").rpartition("/")[2] for base in comparison.bases]
    for name in {name for name in short if short.count(name) > 1}:
        problems.add(f"bases: two are called {name!r}. Rename a folder: rows are named after their base.")
