"""All domains of an experiment, read, checked, split and encoded."""

from __future__ import annotations

import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from jinja2 import TemplateError

from loramix.data.collation import Example
from loramix.data.prompts import Encoded, encode
from loramix.data.reading import SPLITS, read_named_for, read_source
from loramix.data.records import Record
from loramix.errors import DataError, Problems

Truncation = Literal["error", "drop", "left", "right"]
Source = str | Sequence[str] | Mapping[str, str | Sequence[str]]
"""A file, folder or Hub name; several of them; or split (train, validation, test) -> one or several."""
Most = int | Mapping[str, int] | None
"""The same number for every domain, one by domain (others unlimited), or no limit."""


@dataclass(frozen=True)
class Split:
    """The records of one domain, for training and for measuring."""

    train: list[Record]
    test: list[Record]


@dataclass(frozen=True)
class Cut:
    """What the length limit did to one domain: examples shortened, and examples left out."""

    shortened: int
    dropped: int
    total: int


def read_domains(
    sources: Mapping[str, Source],
    *,
    labelled: str | None = None,
    domain_column: str | None = None,
    test_fraction: float = 0.1,
    max_train_examples: Most = None,
    max_test_examples: Most = None,
    seed: int = 0,
) -> dict[str, Split]:
    """Returns the splits of all domains, in the order of the config.

    A folder with a test (or validation) file is used as it is; of a single file a part is held out, chosen by the seed:
    whole questions, so that no prompt is on both sides.

    Args:
        sources: domain -> file, folder or Hub name, several files, or a mapping of splits to such; or, with
            `labelled`, the allowed domains (values unused; empty: whatever labels occur, sorted).
        labelled: one source whose rows carry their own label.
        domain_column: the column with the label; None looks for domain, task, channel or task_id.
        test_fraction: part held out where there is no test file.
        max_train_examples, max_test_examples: for each domain, chosen by the seed; one number, or one by domain.
        seed: of the choices.

    Raises:
        DataError: all that is wrong with all files together: file, line, what was expected.
    """
    problems = Problems("the data")
    if labelled is not None:
        found = _by_label(labelled, tuple(sources), domain_column, problems)
    else:
        found = {domain: _train_and_test(source, domain, problems) for domain, source in sources.items()}
    splits = {}
    for domain, (train, test) in found.items():
        if not train:
            names = [repr(domain), *(name for split in SPLITS for name in _files(sources.get(domain, ""), split))]
            if not any(name and name in message for message in problems.messages for name in names):
                problems.add(f"domain {domain!r} has no rows for training. Add rows, or take the domain out.")
            continue
        shuffled = list(train)
        random.Random(f"{seed} {domain}").shuffle(shuffled)  # a reproducible choice, not a secret
        held = test
        if held is None:
            held, shuffled = _held_out(shuffled, max(1, round(len(shuffled) * test_fraction)))
            if not shuffled and not problems:
                problems.add(
                    f"domain {domain!r} has one row, or asks the same in all; it needs at least two prompts, one to "
                    "train and one to test."
                )
        splits[domain] = Split(shuffled[: _most(max_train_examples, domain)], held[: _most(max_test_examples, domain)])
    problems.raise_as(DataError)
    return splits


def _held_out(rows: Sequence[Record], count: int) -> tuple[list[Record], list[Record]]:
    """Returns at least `count` rows to measure and the rest to learn; rows that ask the same are on one side, else a
    question with several answers would be learned and asked."""
    prompts = [" ".join(row.prompt.split()).casefold() for row in rows]
    by_prompt: dict[str, list[Record]] = {}
    for prompt, row in zip(prompts, rows, strict=True):
        by_prompt.setdefault(prompt, []).append(row)
    held: list[Record] = []
    asked: set[str] = set()
    for prompt, same in by_prompt.items():
        if len(held) >= count:
            break
        held += same
        asked.add(prompt)
    return held, [row for prompt, row in zip(prompts, rows, strict=True) if prompt not in asked]


def read_unseen(
    sources: Mapping[str, Source], *, max_test_examples: Most = None, seed: int = 0
) -> dict[str, list[Record]]:
    """Returns the records of domains that are measured and never learned: their test (or validation) files, or all rows
    of a single file.

    Args:
        sources: domain -> source, as for `read_domains`.
        max_test_examples: for each domain, chosen by the seed.
        seed: of the choices.

    Raises:
        DataError: all that is wrong with all files together.
    """
    problems = Problems("the unseen data")
    found = {}
    for domain, source in sources.items():
        parts = (_read(source, split, domain, problems) for split in ("test", "validation", "train"))
        records = next((part for part in parts if part is not None), None)
        if not records:
            if not problems:
                problems.add(f"unseen domain {domain!r} has no rows. Add rows, or take the domain out.")
            continue
        random.Random(f"{seed} {domain}").shuffle(records)
        found[domain] = records[: _most(max_test_examples, domain)]
    problems.raise_as(DataError)
    return found


def _most(most: Most, domain: str) -> int | None:
    """Returns how many examples of a domain are taken at most."""
    return most.get(domain) if isinstance(most, Mapping) else most


def _train_and_test(source: Source, domain: str, problems: Problems) -> tuple[list[Record] | None, list[Record] | None]:
    train = _read(source, "train", domain, problems)
    if train is None:
        return None, None  # do not ask the Hub again for a source that is not there
    test = _read(source, "test", domain, problems)
    return train, test if test is not None else _read(source, "validation", domain, problems)


def _files(source: Source, split: str) -> list[str]:
    """Returns the names to read for a split; several names without splits hold one table in parts."""
    if isinstance(source, Mapping):
        named = source.get(split, [])
        return [named] if isinstance(named, str) else list(named)
    if isinstance(source, str):
        return [source]
    return list(source) if split == "train" else []


def _read(source: Source, split: str, domain: str, problems: Problems) -> list[Record] | None:
    """Returns the records of one split; None where there is no such split."""
    named = _files(source, split)
    if isinstance(source, str):
        return read_source(source, split, problems, domain=domain)
    if not named:
        return None
    return [record for name in named for record in read_named_for(name, split, problems, domain=domain)]


def name_problem(name: str) -> str | None:
    """Returns what is wrong with a domain's name, or None. Names become folders and names of experts."""
    if re.fullmatch(r"\w[\w .+-]{0,99}", name) and name.strip() == name:
        return None
    return (
        f"{name[:40]!r} is no name for a domain. Expected 1 to 100 letters, digits, spaces or _ . + -, beginning "
        "with a letter or digit."
    )


def _by_label(
    source: str, allowed: Sequence[str], domain_column: str | None, problems: Problems
) -> dict[str, tuple[list[Record] | None, list[Record] | None]]:
    read = {
        split: read_source(source, split, problems, domain=None, domain_column=domain_column)
        for split in ("train", "validation", "test")
    }
    labels = set()
    for records in read.values():
        for record in records or []:
            if record.domain is None:
                problems.add(f"{record.source}: names no domain. Expected a column domain, task, channel or task_id.")
            elif wrong := name_problem(record.domain):
                problems.add(f"{record.source}: {wrong}")
            elif allowed and record.domain not in allowed:
                problems.add(
                    f"{record.source}: label {record.domain!r} is not among the domains ({', '.join(allowed)})."
                )
            else:
                labels.add(record.domain)

    def of(domain: str, split: str) -> list[Record] | None:
        records = read[split]
        return None if records is None else [record for record in records if record.domain == domain]

    return {
        domain: (of(domain, "train"), of(domain, "validation") if read["test"] is None else of(domain, "test"))
        for domain in (allowed or sorted(labels))
    }


def encode_domain(
    tokenizer: Any,
    records: Sequence[Record],
    domain_id: int,
    *,
    max_length: int,
    truncation: Truncation = "right",
    loss_on: str = "response",
) -> tuple[list[Example], Cut]:
    """Returns the examples of one domain and what the length limit did to them.

    Args:
        tokenizer: of the base.
        records: of one domain.
        domain_id: its position among the experts.
        max_length: tokens of an example at most.
        truncation: "right" cuts the end of the response, "left" the beginning of the prompt, "drop" leaves the example
            out, "error" refuses. An example with nothing left to learn is left out and counted.
        loss_on: "response" or "all".

    Raises:
        DataError: with "error", every example that is too long.
    """
    problems = Problems("the data")
    examples, shortened, dropped = [], 0, 0
    for record in records:
        try:
            encoded = encode(tokenizer, record, loss_on=loss_on)
        except (TemplateError, ValueError, TypeError) as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            problems.add(f"{record.source}: the base's chat template cannot render it: {reason}")
            continue
        length = len(encoded.input_ids)
        if length > max_length:
            if truncation == "error":
                problems.add(
                    f"{record.source}: {length} tokens, more than max_length = {max_length}. Raise max_length or set "
                    "truncation to right, left or drop."
                )
                continue
            cut = None if truncation == "drop" else _cut(encoded, max_length, truncation)
            if cut is None:
                dropped += 1
                continue
            encoded, shortened = cut, shortened + 1
        examples.append(Example(encoded, domain_id, record))
    problems.raise_as(DataError)
    return examples, Cut(shortened, dropped, len(records))


def _cut(encoded: Encoded, max_length: int, side: str) -> Encoded | None:
    """Returns the example shortened, or None when no prompt or nothing supervised is left."""
    surplus = len(encoded.input_ids) - max_length
    part = slice(0, max_length) if side == "right" else slice(surplus, None)
    prompt = min(encoded.prompt_length, max_length) if side == "right" else encoded.prompt_length - surplus
    cut = Encoded(encoded.input_ids[part], encoded.supervised[part], prompt)
    return cut if prompt > 0 and any(cut.supervised[1:]) else None
