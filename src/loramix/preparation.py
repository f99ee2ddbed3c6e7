"""An experiment's data and base, read, checked and encoded, before anything is written."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from loramix.adapter_settings import adapter_config
from loramix.data.collation import Example
from loramix.data.domains import Cut, encode_domain, read_domains
from loramix.data.mixing import domain_shares
from loramix.environment import environment
from loramix.errors import DataError, Problems
from loramix.experiment import as_yaml
from loramix.methods import method_named
from loramix.models import load_base, load_skeleton, load_tokenizer
from loramix.run_folder import RunFolder, write_json
from loramix.settings import Experiment
from loramix.tuner import check_fit


@dataclass
class Prepared:
    """Data and base of an experiment, checked and encoded.

    Attributes:
        experiment, run: settings and folder.
        base, tokenizer: the frozen model.
        train, held: examples by domain, in the order of `domain_ids`.
        console: where progress is shown.
    """

    experiment: Experiment
    run: RunFolder
    base: Any
    tokenizer: Any
    train: dict[str, list[Example]]
    held: dict[str, list[Example]]
    console: Console

    @property
    def domains(self) -> list[str]:
        return list(self.train)

    @property
    def pad(self) -> int:
        return int(self.tokenizer.pad_token_id)

    def shares(self) -> dict[str, float]:
        data = self.experiment.data
        sizes = {domain: len(examples) for domain, examples in self.train.items()}
        return domain_shares(sizes, data.mixing, temperature=data.mixing_temperature, weights=data.mixing_weights)

    def kinds(self) -> list[int]:
        """Returns the kind of each domain, 0 or 1: as set, else the first half 0 and the second half 1."""
        kinds = self.experiment.data.kinds or {}
        count = len(self.domains)
        return [kinds.get(domain, position * 2 // count) for position, domain in enumerate(self.domains)]


def prepare(experiment: Experiment, console: Console, *, new: bool = True) -> Prepared:
    """Returns the experiment's data and base. Nothing is written before all of it is found good.

    Args:
        experiment: the settings.
        console: where progress is shown.
        new: make the run folder and write its settings; False reads data for a run that exists.

    Raises:
        DataError, ModelError, ConfigError: what is wrong, all at once for the data.
    """
    data = experiment.data
    splits = read_domains(
        {domain: source or "" for domain, source in data.domains.items()},
        labelled=data.path,
        domain_column=data.domain_column,
        test_fraction=data.test_fraction,
        max_train_examples=data.max_train_examples,
        max_test_examples=data.max_test_examples,
        seed=experiment.seed,
    )
    tokenizer = load_tokenizer(experiment.model_name_or_path)
    train: dict[str, list[Example]] = {}
    held: dict[str, list[Example]] = {}
    counts: dict[str, Any] = {}
    for domain_id, (domain, split) in enumerate(splits.items()):
        how: dict[str, Any] = {"max_length": data.max_length, "truncation": data.truncation, "loss_on": data.loss_on}
        train[domain], cut = encode_domain(tokenizer, split.train, domain_id, **how)
        held[domain], held_cut = encode_domain(tokenizer, split.test, domain_id, **how)
        counts[domain] = {"train": _counts(train[domain], cut), "test": _counts(held[domain], held_cut)}
    _check_not_empty(train, held, data.max_length)
    if method_named(experiment.method).tuner == "loramix":
        check_fit(load_skeleton(experiment.model_name_or_path), adapter_config(experiment, list(train)))
    base = load_base(experiment.model_name_or_path, dtype=experiment.dtype)
    run = RunFolder(Path(experiment.output_dir))
    if new:
        run.create()
        run.config.write_text(as_yaml(_anchored(experiment)), encoding="utf-8")
        write_json(run.environment, environment())
        write_json(run.data, counts)
    _report_cuts(counts, console)
    return Prepared(experiment, run, base, tokenizer, train, held, console)


def _anchored(experiment: Experiment) -> Experiment:
    """Returns the experiment with local paths made absolute, so that the run can be opened from anywhere."""

    def anchored(name: str | None) -> str | None:
        return str(Path(name).expanduser().resolve()) if name and Path(name).expanduser().exists() else name

    data = experiment.data
    domains = {domain: anchored(source) for domain, source in data.domains.items()}
    return experiment.model_copy(
        update={
            "model_name_or_path": anchored(experiment.model_name_or_path),
            "data": data.model_copy(update={"domains": domains, "path": anchored(data.path)}),
        }
    )


def _counts(examples: Sequence[Example], cut: Cut) -> dict[str, int]:
    return {
        "examples": len(examples),
        "tokens": sum(example.length for example in examples),
        "supervised_tokens": sum(example.supervised_tokens for example in examples),
        "shortened": cut.shortened,
        "dropped": cut.dropped,
    }


def _check_not_empty(train: dict[str, list[Example]], held: dict[str, list[Example]], max_length: int) -> None:
    problems = Problems("the data")
    for name, part in (("training", train), ("test", held)):
        for domain, examples in part.items():
            if not examples:
                problems.add(
                    f"domain {domain!r} has no {name} example left within max_length = {max_length}. Raise max_length."
                )
    problems.raise_as(DataError)


def _report_cuts(counts: dict[str, Any], console: Console) -> None:
    for domain, splits in counts.items():
        train = splits["train"]
        line = f"{domain}: {train['examples']} to train on, {splits['test']['examples']} to test on"
        cuts = [
            f"{splits[s][kind]} {kind} ({s})"
            for s in ("train", "test")
            for kind in ("shortened", "dropped")
            if splits[s][kind]
        ]
        if cuts:
            line += f"; longer than the limit: {', '.join(cuts)}"
        console.print(line, highlight=False, soft_wrap=True)
