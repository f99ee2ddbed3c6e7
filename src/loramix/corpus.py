"""What an experiment learns and what it is measured on: read, split, changed where asked, and encoded."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loramix.data.collation import Example
from loramix.data.domains import Cut, Split, encode_domain, read_domains, read_unseen
from loramix.data.mixing import domain_shares
from loramix.data.overlap import Overlap, find_overlap, without_leaks
from loramix.data.records import Record
from loramix.data.relabel import deal, flip_labels, hide_labels
from loramix.errors import ConfigError, DataError, Problems
from loramix.settings import DataSettings, Experiment

UNSEEN = -1
"""Domain id of examples whose domain has no expert."""


@dataclass(frozen=True)
class Encoded:
    """All examples of an experiment.

    Attributes:
        train, held: examples to learn and to measure, by domain, in the order of `domain_ids`.
        unseen: examples of domains that are measured and never learned.
        counts: rows, tokens and cuts by domain and split, for data.json.
        overlap: test rows that occur in training data; see data/overlap.py.
    """

    train: dict[str, list[Example]]
    held: dict[str, list[Example]]
    unseen: dict[str, list[Example]]
    counts: dict[str, Any]
    overlap: list[dict[str, Any]]

    def shares(self, data: DataSettings) -> dict[str, float]:
        """Returns each domain's share of a mixture."""
        sizes = {domain: len(examples) for domain, examples in self.train.items()}
        return domain_shares(sizes, data.mixing, temperature=data.mixing_temperature, weights=data.mixing_weights)

    def kinds(self, data: DataSettings) -> dict[str, int]:
        """Returns the kind of each domain, 0 or 1: as set, else the first half 0 and the second half 1."""
        given, count = data.kinds or {}, len(self.train)
        return {domain: given.get(domain, position * 2 // count) for position, domain in enumerate(self.train)}


def encode_all(experiment: Experiment, tokenizer: Any) -> Encoded:
    """Returns the experiment's data, read, split and encoded.

    Raises:
        DataError: what is wrong with all files, at once.
    """
    data = experiment.data
    splits, unseen = read_all(experiment)
    splits, leaks = _changed(splits, unseen, data, experiment.seed if data.seed is None else data.seed)
    train: dict[str, list[Example]] = {}
    held: dict[str, list[Example]] = {}
    counts: dict[str, Any] = {}
    how: dict[str, Any] = {"max_length": data.max_length, "truncation": data.truncation, "loss_on": data.loss_on}
    for domain_id, (domain, split) in enumerate(splits.items()):
        train[domain], cut = encode_domain(tokenizer, split.train, domain_id, **how)
        held[domain], held_cut = encode_domain(tokenizer, split.test, domain_id, **how)
        counts[domain] = {"train": _counts(train[domain], cut), "test": _counts(held[domain], held_cut)}
    never: dict[str, list[Example]] = {}
    for domain, records in unseen.items():
        never[domain], cut = encode_domain(tokenizer, records, UNSEEN, **how)
        counts[domain] = {"test": _counts(never[domain], cut)}
    _check_not_empty(train, {**held, **never}, data.max_length)
    return Encoded(train, held, never, counts, [overlap.as_dict() for overlap in leaks])


def _changed(
    splits: dict[str, Split], unseen: Mapping[str, list[Record]], data: DataSettings, seed: int
) -> tuple[dict[str, Split], list[Overlap]]:
    """Returns the splits as they are to be learned, and what of the test data occurs in training data.

    Raises:
        DataError: there is such an overlap and data.overlap is "error".
    """
    everything = {**splits, **{domain: Split([], records) for domain, records in unseen.items()}}
    leaks = find_overlap(everything) if data.overlap != "ignore" else []
    if data.overlap == "drop":
        splits = without_leaks(splits, leaks)
    problems = Problems("the data")
    for leak in leaks if data.overlap == "error" else []:
        if leak.sides == "train-test":
            first = f"{leak.examples[0][0]} and {leak.examples[0][1]}"
            problems.add(
                f"{leak.count} of {leak.of} test rows of {leak.test!r} occur in the training data of {leak.train!r} "
                f"({leak.kind}), for example {first}. Remove them, or set data.overlap to drop or report."
            )
    problems.raise_as(DataError)
    splits = deal(splits, data.split_in)
    if data.missing_labels:
        splits, _ = hide_labels(splits, data.missing_labels, seed, data.missing)
    return flip_labels(splits, data.label_noise, seed) if data.label_noise else splits, leaks


def read_all(experiment: Experiment) -> tuple[dict[str, Split], dict[str, list[Record]]]:
    """Returns the splits of the domains, and the records of the domains that are only measured.

    Raises:
        ConfigError: data.root is no folder.
        DataError: what is wrong with all files, at once.
    """
    data = experiment.data
    seed = experiment.seed if data.seed is None else data.seed
    splits = read_domains(
        {domain: source or "" for domain, source in rooted(data.domains, data.root).items()},
        labelled=None if data.path is None else rooted(data.path, data.root),
        domain_column=data.domain_column,
        test_fraction=data.test_fraction,
        max_train_examples=data.max_train_examples,
        max_test_examples=data.max_test_examples,
        seed=seed,
    )
    unseen = read_unseen(rooted(data.unseen, data.root), max_test_examples=data.max_test_examples, seed=seed)
    if both := sorted(splits.keys() & unseen.keys()):  # with data.path the labels are known only now
        raise DataError(f"data.unseen: {', '.join(both)}: is a label of the data too. Give it another name.")
    return splits, unseen


def rooted(sources: Any, root: str | None) -> Any:
    """Returns sources with what lies below the root folder named from there; Hub names and other paths as they are.

    Raises:
        ConfigError: there is no such folder.
    """
    if root is None:
        return sources
    folder = Path(root).expanduser()
    if not folder.is_dir():
        raise ConfigError(f"data.root = {root!r}: no such folder. Name the folder that the domains' files lie in.")

    def below(name: str) -> str:
        here = "*" in name or (folder / name).exists()
        return str(folder / name) if here and not name.startswith("~") else name

    return every_name(sources, below)


def every_name(source: Any, changed: Callable[[str], str]) -> Any:
    """Returns a source, or a mapping or list of them, with every name changed."""
    if isinstance(source, str):
        return changed(source)
    if isinstance(source, Mapping):
        return {key: every_name(value, changed) for key, value in source.items()}
    return [every_name(value, changed) for value in source] if isinstance(source, list) else source


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
