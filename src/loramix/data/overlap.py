"""Finds test rows that occur in training data: word for word, or nearly so.

A near duplicate has at least 0.8 of its character 5-grams in common (Jaccard: shared over all of both). Character
n-grams need no tokenizer, so Chinese works; 0.8 leaves room for a changed word or another way to list options, and
none for two questions that only share a template.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from loramix.data.domains import Split
from loramix.data.records import Record

NEAR = 0.8
LONGEST = 4000
"""Characters of a prompt that are compared."""
_SHOWN = 5
_BLOCK = 256

Kind = Literal["exact", "near"]
_KINDS: tuple[Kind, Kind] = ("exact", "near")
Sides = Literal["train-test", "train-train"]


@dataclass(frozen=True)
class Overlap:
    """Rows of one part that occur in another.

    Attributes:
        kind: "exact" after folding case, blanks and punctuation, else "near".
        sides: "train-test" is leakage; "train-train" tells that two domains share material.
        train, test: the domains; for train-train the second domain's training part stands in `test`.
        count, of: how many rows of the second part were found in the first, and how many it has.
        examples: (row of the first, row of the second, similarity), a few, by where they were read.
        rows: positions of the found rows in the first part.
    """

    kind: Kind
    sides: Sides
    train: str
    test: str
    count: int
    of: int
    examples: tuple[tuple[str, str, float], ...]
    rows: tuple[int, ...]

    def as_dict(self) -> dict[str, Any]:
        """Returns what results files keep."""
        kept = {name: getattr(self, name) for name in ("kind", "sides", "train", "test", "count", "of")}
        return {**kept, "examples": [list(one) for one in self.examples]}


def compared_text(record: Record) -> str:
    """Returns what of a prompt is compared: words alone; of a question with options no letters and no instruction."""
    text = record.prompt
    if record.choices:
        text = re.sub(r"(?m)^[A-Z]\. ", "", text.rpartition("\n")[0])
    return " ".join(re.findall(r"\w+", text[:LONGEST].casefold()))


def find_overlap(splits: Mapping[str, Split], *, near: float = NEAR) -> list[Overlap]:
    """Returns all overlaps: every test part against every training part, and training parts of different domains.

    Args:
        splits: by domain.
        near: similarity from which two prompts are near duplicates.
    """
    train = {domain: _Part(split.train) for domain, split in splits.items()}
    test = {domain: _Part(split.test) for domain, split in splits.items()}
    found: list[Overlap] = []
    for first in splits:
        for second in splits:
            found += _between(train[first], test[second], "train-test", first, second, near)
    names = list(splits)
    for position, first in enumerate(names):
        for second in names[position + 1 :]:
            found += _between(train[first], train[second], "train-train", first, second, near)
    return found


def without_leaks(splits: Mapping[str, Split], overlaps: Sequence[Overlap]) -> dict[str, Split]:
    """Returns the splits without the training rows that occur in some test part."""
    leaked: dict[str, set[int]] = {domain: set() for domain in splits}
    for overlap in overlaps:
        if overlap.sides == "train-test":
            leaked[overlap.train] |= set(overlap.rows)
    return {
        domain: Split([record for i, record in enumerate(split.train) if i not in leaked[domain]], split.test)
        for domain, split in splits.items()
    }


class _Part:
    """The prompts of some records as texts and, once asked for, as sets of 5-grams."""

    def __init__(self, records: Sequence[Record]) -> None:
        self.records = records
        self.texts = [compared_text(record) for record in records]
        self._grams: Any = None

    @property
    def grams(self) -> Any:
        """Binary sparse (N, 2^20)."""
        if self._grams is None:
            from sklearn.feature_extraction.text import HashingVectorizer

            vectorizer = HashingVectorizer(
                analyzer="char_wb", ngram_range=(5, 5), binary=True, norm=None, alternate_sign=False
            )
            self._grams = vectorizer.transform(self.texts)
        return self._grams


def _between(first: _Part, second: _Part, sides: Sides, train: str, test: str, near: float) -> Iterator[Overlap]:
    """Yields at most one overlap of each kind between two parts; a row is counted once, by its most similar other."""
    exact: list[tuple[int, int, float]] = []
    close: list[tuple[int, int, float]] = []
    for row, other, similarity in _pairs(first, second, near):
        same = first.texts[other] == second.texts[row]
        (exact if same else close).append((row, other, similarity))
    known = {row for row, _, _ in exact}
    close = [one for one in close if one[0] not in known]
    for kind, pairs in zip(_KINDS, (exact, close), strict=True):
        rows = {row for row, _, _ in pairs}
        if rows:
            shown: dict[int, tuple[str, str, float]] = {}
            for row, other, similarity in pairs:
                said = (first.records[other].source, second.records[row].source, round(similarity, 3))
                shown.setdefault(row, said)
            others = tuple(sorted({other for _, other, _ in pairs}))
            examples = tuple(list(shown.values())[:_SHOWN])
            yield Overlap(kind, sides, train, test, len(rows), len(second.records), examples, others)


def _pairs(first: _Part, second: _Part, near: float) -> Iterator[tuple[int, int, float]]:
    """Yields (row of the second, row of the first, similarity) of all pairs at least `near` alike."""
    import numpy as np

    if not first.texts or not second.texts:
        return
    a, b = first.grams, second.grams
    sizes_a, sizes_b = np.diff(a.indptr), np.diff(b.indptr)
    transposed = a.T.tocsr()
    for start in range(0, b.shape[0], _BLOCK):
        shared = (b[start : start + _BLOCK] @ transposed).tocoo()
        whole = sizes_b[start + shared.row] + sizes_a[shared.col] - shared.data
        similar = shared.data / np.maximum(whole, 1)
        for k in np.flatnonzero(similar >= near):
            yield start + int(shared.row[k]), int(shared.col[k]), float(similar[k])
    # Prompts too short for a 5-gram are compared whole.
    short = {text: i for i, text in enumerate(first.texts) if sizes_a[i] == 0 and text}
    for row, text in enumerate(second.texts):
        if sizes_b[row] == 0 and text in short:
            yield row, short[text], 1.0
