"""Changes to the labels of training data, for questions the papers leave open: what noisy, missing or needless labels
cost. Test parts keep their labels, except that a domain dealt out to several is dealt out in its test part too."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Literal

from loramix.data.classify import TF_IDF, fit
from loramix.data.domains import Split
from loramix.data.records import Record
from loramix.errors import DataError, Problems

Treatment = Literal["drop", "classify"]


def flip_labels(splits: Mapping[str, Split], share: float, seed: int) -> dict[str, Split]:
    """Returns splits in which a share of every domain's training rows bears the label of another domain.

    Args:
        splits: by domain, at least two.
        share: of each domain's rows, from 0 to 1; rounded to whole rows.
        seed: of the choice of rows and labels.
    """
    train: dict[str, list[Record]] = {domain: [] for domain in splits}
    for domain, split in splits.items():
        draw = random.Random(f"{seed} flip {domain}")
        wrong = set(draw.sample(range(len(split.train)), round(share * len(split.train))))
        others = [other for other in splits if other != domain]
        for position, record in enumerate(split.train):
            label = draw.choice(others) if position in wrong else domain
            train[label].append(replace(record, domain=label))
    return {domain: Split(train[domain], split.test) for domain, split in splits.items()}


def hide_labels(
    splits: Mapping[str, Split], share: float, seed: int, treatment: Treatment
) -> tuple[dict[str, Split], float | None]:
    """Returns splits as if a share of every domain's training rows had come without a label, and how many of the labels
    a classifier gave them are right.

    Args:
        splits: by domain.
        share: of each domain's rows without a label.
        seed: of the choice.
        treatment: "drop" leaves those rows out; "classify" labels them by a classifier fitted to the labelled rows.
    """
    known: dict[str, list[Record]] = {}
    hidden: list[tuple[str, Record]] = []
    for domain, split in splits.items():
        draw = random.Random(f"{seed} hide {domain}")
        # At least one row keeps its label: without any the domain would not be known.
        count = min(round(share * len(split.train)), len(split.train) - 1)
        chosen = set(draw.sample(range(len(split.train)), count))
        known[domain] = [record for i, record in enumerate(split.train) if i not in chosen]
        hidden += [(domain, split.train[i]) for i in sorted(chosen)]
    right = None
    if treatment == "classify" and hidden:
        given = _classified(known, [record for _, record in hidden], seed)
        for label, (_, record) in zip(given, hidden, strict=True):
            known[label].append(replace(record, domain=label))
        right = sum(label == domain for label, (domain, _) in zip(given, hidden, strict=True)) / len(hidden)
    return {domain: Split(known[domain], split.test) for domain, split in splits.items()}, right


def _classified(known: Mapping[str, Sequence[Record]], hidden: Sequence[Record], seed: int) -> list[str]:
    domains = list(known)
    rows = [(record.prompt, number) for number, domain in enumerate(domains) for record in known[domain]]
    classify = fit(TF_IDF, [prompt for prompt, _ in rows], [number for _, number in rows], seed=seed)
    return [domains[number] for number in classify([record.prompt for record in hidden])]


def deal(splits: Mapping[str, Split], parts: Mapping[str, int]) -> dict[str, Split]:
    """Returns splits in which some domains are dealt out row by row to several, "name 1", "name 2", ...: domains that
    are as alike as can be.

    Args:
        splits: by domain.
        parts: domain -> how many it becomes.

    Raises:
        DataError: a domain has fewer rows than parts, or a part's name is taken.
    """
    problems = Problems("data.split_in")
    for domain, count in parts.items():
        for name, rows in (("training", splits[domain].train), ("test", splits[domain].test)):
            if len(rows) < count:
                problems.add(f"domain {domain!r} has {len(rows)} {name} rows, too few for {count} parts. Lower it.")
        taken = [f"{domain} {number + 1}" for number in range(count) if f"{domain} {number + 1}" in splits]
        problems.messages += [f"domain {name!r} is there already. Rename it." for name in taken]
    problems.raise_as(DataError)
    dealt: dict[str, Split] = {}
    for domain, split in splits.items():
        count = parts.get(domain, 1)
        for number in range(count):
            name = f"{domain} {number + 1}" if count > 1 else domain
            train, test = (
                [replace(record, domain=name) for record in part[number::count]] for part in (split.train, split.test)
            )
            dealt[name] = Split(train, test)
    return dealt
