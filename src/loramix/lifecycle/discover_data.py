"""The rows that domains are discovered in, and the labelled data set they become."""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loramix.data.choices import LETTERS
from loramix.data.reading import SPLITS, find_split, read_named_for, read_source
from loramix.data.records import Record
from loramix.errors import DataError, Problems

TRAIN, TEST, REPORT = "train.jsonl", "test.jsonl", "discovered.json"
TRUE = "true_domain"
"""Column with the label a row came with."""


@dataclass(frozen=True)
class Rows:
    """Records to learn and to measure; a record's `domain` is its true label, if it came with one."""

    train: list[Record]
    test: list[Record]


@dataclass(frozen=True)
class Found:
    """A record and the domain discovered for it."""

    record: Record
    domain: str


Kind = Callable[[Found], str | None]
_KINDS: tuple[Kind, Kind] = (lambda row: row.domain, lambda row: row.record.domain)


def read_rows(
    sources: Sequence[str],
    test_sources: Sequence[str] = (),
    *,
    label_column: str | None = None,
    test_fraction: float = 0.1,
    seed: int = 0,
) -> Rows:
    """Returns the rows of some sources.

    Held out are the rows of `test_sources`; without them the test (or validation) part of each folder or Hub data set,
    and of what has none a part chosen by the seed: whole questions, so that no prompt is on both sides.

    Args:
        sources: files, folders, patterns or Hub names; "NAME=SOURCE" says that all its rows have the true label NAME.
        test_sources: the same, for the rows to measure.
        label_column: the column with true labels; None looks for domain, task, channel or task_id.
        test_fraction: part held out where there is no test part.
        seed: of the choice.

    Raises:
        DataError: all that is wrong with all files together.
    """
    problems = Problems("the data")
    train: list[Record] = []
    test: list[Record] = []
    to_split: list[Record] = []  # of all sources together: two may ask the same
    for given in sources:
        label, name = _label_and_source(given)
        how: dict[str, Any] = {"domain": label, "domain_column": None if label else label_column}
        rows = read_source(name, "train", problems, **how)
        if rows is None:
            problems.add(f"{name}: has no train part. Expected a data file, or a folder or Hub data set with one.")
            continue
        held: list[Record] | None = []
        if not test_sources:
            held = read_source(name, "test", problems, **how)
            held = read_source(name, "validation", problems, **how) if held is None else held
        if held is None:
            to_split += rows
        else:
            train += rows
            test += held
    if to_split:
        kept, held = _held_out(to_split, test_fraction, seed)
        train += kept
        test += held
    for given in test_sources:
        label, name = _label_and_source(given)
        test += _test_rows(name, label, label_column, problems)
    if not train and not problems:
        problems.add(f"{', '.join(sources)}: no rows to learn. Expected at least four prompts.")
    problems.raise_as(DataError)
    return Rows(train, test)


def _label_and_source(given: str) -> tuple[str | None, str]:
    """Returns (label, source) of "NAME=SOURCE"; a path that has an equals sign in it is a path."""
    label, equals, source = given.partition("=")
    if not label or not equals or "/" in label or Path(given).expanduser().exists():
        return None, given
    return label, source


def _test_rows(name: str, label: str | None, label_column: str | None, problems: Problems) -> list[Record]:
    """Returns all rows of a file or pattern; of a folder or Hub data set its test part."""
    if "*" in name or Path(name).expanduser().is_file():
        return read_source(name, "train", problems, domain=label, domain_column=None if label else label_column) or []
    if label is not None or label_column is None:
        return read_named_for(name, "test", problems, domain=label)
    found = read_source(name, "test", problems, domain=None, domain_column=label_column)
    if found is None:
        problems.add(f"{name}: no such file, and no folder or Hub data set with a test part.")
    return found or []


def question(record: Record) -> str:
    """Returns what a row asks, without case and blanks; equal for rows that must be on one side of the split."""
    return " ".join(record.prompt.split()).casefold()


def _held_out(rows: Sequence[Record], fraction: float, seed: int) -> tuple[list[Record], list[Record]]:
    """Returns (rows to learn, rows to measure), each in the order given."""
    count = max(1, round(len(rows) * fraction))
    numbers = Counter(map(question, rows))
    order = sorted(numbers)
    random.Random(f"{seed} held out").shuffle(order)  # a reproducible choice, not a secret
    asked: set[str] = set()
    taken = 0
    for one in order:
        if taken >= count:
            break
        asked.add(one)
        taken += numbers[one]
    return [row for row in rows if question(row) not in asked], [row for row in rows if question(row) in asked]


def covered(train: Sequence[Found], test: Sequence[Found]) -> tuple[list[Found], list[Found]]:
    """Returns (rows to learn, rows to measure) with every domain, and where it can be every true label, on both sides:
    `loramix train` needs a row of each to measure. Where there was none, the rows of one question were moved.

    Raises:
        DataError: domains that ask one question only.
    """
    moved: set[str] = set()
    problems = Problems("the clusters")
    for kind in _KINDS:
        there = {kind(row) for row in test} | {kind(row) for row in train if question(row.record) in moved}
        missing: dict[str, list[Found]] = {}
        for row in train:
            if (name := kind(row)) is not None and name not in there:
                missing.setdefault(name, []).append(row)
        for name, candidates in missing.items():
            if kind is not _KINDS[0] and len(candidates) < 2:  # an id of each row's own, perhaps
                continue
            learned = [row for row in train if question(row.record) not in moved]
            asked = _movable(learned, candidates, _KINDS)
            if asked is None and kind is _KINDS[0]:  # a label may go from training for the sake of a domain
                asked = _movable(learned, candidates, _KINDS[:1])
                if asked is None:
                    problems.add(f"{name!r} asks one question only, which can be learned or measured. Lower --k.")
            moved |= set() if asked is None else {asked}
    problems.raise_as(DataError)
    learned = [row for row in train if question(row.record) not in moved]
    return learned, [*test, *(row for row in train if question(row.record) in moved)]


def _movable(learned: Sequence[Found], candidates: Sequence[Found], kinds: Sequence[Kind]) -> str | None:
    """Returns the first question of the candidates whose rows can go and leave rows of every group to learn."""
    left = {question(row.record) for row in learned}
    questions = [one for one in dict.fromkeys(question(row.record) for row in candidates) if one in left]
    if len(questions) < 2:
        return None
    sizes = Counter((kind, kind(row)) for row in learned for kind in kinds)
    for asked in questions:
        going = Counter((kind, kind(row)) for row in learned if question(row.record) == asked for kind in kinds)
        if all(sizes[one] > count for one, count in going.items()):
            return asked
    return None


def as_row(found: Found) -> dict[str, Any]:
    """Returns a row from which the reader makes the same record again, with the discovered domain as its label."""
    record = found.record
    roles = [message.role for message in record.messages]
    row: dict[str, Any]
    if record.choices:
        asked = record.prompt.rpartition(f"\n{LETTERS[0]}. {record.choices[0]}\n")[0]
        row = {"question": asked, "choices": list(record.choices), "answer": record.response}
    elif roles == ["user", "assistant"]:
        row = {"prompt": record.prompt, "response": record.response}
    elif roles == ["system", "user", "assistant"] and record.messages[0].content:
        row = {"system": record.messages[0].content, "prompt": record.prompt, "response": record.response}
    else:
        row = {"messages": [{"role": message.role, "content": message.content} for message in record.messages]}
    if record.tools:
        row["tools"] = list(record.tools)
    row["domain"] = found.domain
    if record.domain is not None:
        row[TRUE] = record.domain
    return row


def output_problems(folder: Path) -> list[str]:
    """Returns what is wrong with a folder to write to: data that are there already would be mixed with ours."""
    if folder.exists() and not folder.is_dir():
        return [f"--output-dir {folder}: is a file. Name a folder."]
    splits = [find_split(folder, split) for split in SPLITS]
    taken = dict.fromkeys([path.name for path in splits if path] + [REPORT] * (folder / REPORT).exists())
    if not taken:
        return []
    return [f"--output-dir {folder}: holds {', '.join(taken)} already. Name another folder, or remove this one."]


def write_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Writes rows as JSON lines; the file appears whole or not at all."""
    making = path.with_name(path.name + ".making")
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    making.write_text(text, encoding="utf-8")
    making.replace(path)
