"""Finds test rows that occur in training data: word for word, or nearly so.

Compared is what is asked: all user turns; of a question with options, the question and the options, without the
template around them. Two rows are exact copies if their words are the same in the same order (of options: in any
order), whatever case, blanks and punctuation. They are near copies if their sets of words and of pairs of neighbouring
words are alike: weighted Jaccard similarity, each word or pair weighing log(1 + rows / rows that have it). So what many
rows have in common, a template in the prompt for example, weighs little, and no list of templates is needed.

All pairs at least that alike are found, none is guessed: of two sets with similarity >= t, the rarest element they
share lies in each one's prefix, its rarest elements up to a rest that weighs less than t of the whole (prefix
filtering: Chaudhuri, Ganti and Kaushik 2006, "A primitive operator for similarity joins in data cleaning"). Few rows
share a rare element, so few pairs are left to compare in full.
"""

from __future__ import annotations

import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

from loramix.data.choices import LETTERS
from loramix.data.domains import Split
from loramix.data.records import Record

NEAR = 0.7
"""From here on rows are near copies; docs/overlap.md shows what lies above and below it in real data."""
_SHOWN = 5
_BUCKETS = 2**22
_BLOCK = 256
_CHUNK = 20_000
_CJK = r"\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\u3040-\u30ff"
# A word, one Chinese or Japanese character, or the sign before a number: 3 + 4 and 3 - 4 are different questions.
_TOKEN = re.compile(rf"[{_CJK}]|[^\W_{_CJK}]+|[-+*/^=<>](?=\s*\d)")

Kind = Literal["exact", "near"]
_KINDS: tuple[Kind, Kind] = ("exact", "near")
Sides = Literal["train-test", "train-train"]
Words = tuple[str, ...]


@dataclass(frozen=True)
class Overlap:
    """Rows of one part that occur in another.

    Attributes:
        kind: "exact" after folding case, blanks and punctuation, else "near".
        sides: "train-test" is leakage; "train-train" tells that two domains share material.
        train, test: the domains; for train-train the second domain's training part stands in `test`.
        count, of: how many rows of the second part were found in the first, and how many it has; one that has an exact
            copy is not counted as near.
        examples: (row of the first, row of the second, similarity), at most five, the most alike first.
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


@dataclass(frozen=True)
class Asked:
    """What a row asks.

    Attributes:
        key: equal for exact copies: all words in order, and the words of each option, sorted.
        lines: the words of each line and option, whose neighbours are paired: options in another order, be they lines
            of a plain prompt or a record's choices, make the same pairs.
    """

    key: tuple[Words, tuple[Words, ...]]
    lines: tuple[Words, ...]

    def elements(self) -> list[str]:
        """Returns the words and the pairs of neighbouring words."""
        pairs = (f"{left} {right}" for words in self.lines for left, right in pairwise(words))
        return [*(word for words in self.lines for word in words), *pairs]


def normal_words(text: str) -> Words:
    """Returns the words of a text without case, width, blanks and punctuation; each Chinese or Japanese character is a
    word, and so is the sign before a number. A text without words is one word: itself."""
    normal = unicodedata.normalize("NFKC", text).casefold().strip()
    return tuple(_TOKEN.findall(normal)) or ((normal,) if normal else ())


def asked(record: Record) -> Asked:
    """Returns what a row asks: all user turns, or a question and its options without the template around them."""
    text = "\n".join(message.content for message in record.messages if message.role == "user")
    if record.choices:
        text = text.rpartition(f"\n{LETTERS[0]}. {record.choices[0]}\n")[0] or text
    options = tuple(sorted(normal_words(choice) for choice in record.choices))
    lines = tuple(words for words in map(normal_words, text.splitlines()) if words)
    return Asked((tuple(word for line in lines for word in line), options), (*lines, *options))


def find_overlap(splits: Mapping[str, Split], *, near: float = NEAR) -> list[Overlap]:
    """Returns all overlaps: every test part against every training part, and training parts of different domains.

    Args:
        splits: by domain; one that is only measured has no training rows.
        near: similarity from which two prompts are near duplicates, above 0 and at most 1.
    """
    train, test = _parts(splits, near)
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
    """Returns the splits without the training rows that occur in some test part; test parts stay as they are, so that
    figures remain comparable with other people's."""
    leaked: dict[str, set[int]] = {domain: set() for domain in splits}
    for overlap in overlaps:
        if overlap.sides == "train-test":
            leaked[overlap.train] |= set(overlap.rows)
    return {
        domain: Split([record for i, record in enumerate(split.train) if i not in leaked[domain]], split.test)
        for domain, split in splits.items()
    }


@dataclass(frozen=True)
class _Part:
    """One domain's training or test rows, what they ask, and the weighted sets made of it.

    `elements` (N, buckets) holds square roots of weights, so that the product of two rows is the weight they share;
    `prefixes` (N, buckets) has ones at each row's rarest elements; `weights_N` is the weight of the whole row.
    """

    records: Sequence[Record]
    asked: Sequence[Asked]
    elements: Any
    prefixes: Any
    weights_N: Any


def _parts(splits: Mapping[str, Split], near: float) -> tuple[dict[str, _Part], dict[str, _Part]]:
    """Returns the training and the test part of every domain; elements are weighed over all of them together."""
    import numpy as np
    from scipy import sparse
    from sklearn.feature_extraction.text import HashingVectorizer

    vectorizer = HashingVectorizer(
        analyzer=Asked.elements, n_features=_BUCKETS, binary=True, norm=None, alternate_sign=False
    )
    sides = [split.train for split in splits.values()] + [split.test for split in splits.values()]
    questions = [[asked(record) for record in records] for records in sides]
    sets = [vectorizer.transform(part) if part else sparse.csr_matrix((0, _BUCKETS)) for part in questions]
    seen = sum((np.bincount(one.indices, minlength=_BUCKETS) for one in sets), np.zeros(_BUCKETS, dtype=np.int64))
    weight = np.log1p(sum(one.shape[0] for one in sets) / np.maximum(seen, 1))
    parts = []
    for records, part, elements in zip(sides, questions, sets, strict=True):
        elements.data = np.sqrt(weight[elements.indices])
        weights_N = np.asarray(elements.multiply(elements).sum(axis=1)).ravel()
        parts.append(_Part(records, part, elements, _prefixes(elements, weights_N, seen, near), weights_N))
    return dict(zip(splits, parts, strict=False)), dict(zip(splits, parts[len(splits) :], strict=True))


def _prefixes(elements: Any, weights_N: Any, seen: Any, near: float) -> Any:
    """Returns each row's rarest elements, up to a rest that weighs less than `near` of the row."""
    import numpy as np
    from scipy import sparse

    columns, starts = [np.zeros(0, dtype=elements.indices.dtype)], [0]
    for row, whole in enumerate(weights_N):
        part = slice(elements.indptr[row], elements.indptr[row + 1])
        own, weights = elements.indices[part], elements.data[part] ** 2
        order = np.lexsort((own, seen[own]))  # one order for all rows: rarest first, then by column
        rest = whole - (np.cumsum(weights[order]) - weights[order])
        # Rounding may make a prefix longer, which costs a comparison, never shorter, which would cost a copy.
        columns.append(own[order[rest >= near * whole * (1 - 1e-9)]])
        starts.append(starts[-1] + len(columns[-1]))
    indices = np.concatenate(columns)
    return sparse.csr_matrix((np.ones(len(indices), dtype=np.float32), indices, starts), shape=elements.shape)


def _between(first: _Part, second: _Part, sides: Sides, train: str, test: str, near: float) -> Iterator[Overlap]:
    """Yields at most one overlap of each kind between two parts."""
    by_key: defaultdict[Any, list[int]] = defaultdict(list)
    for position, question in enumerate(first.asked):
        if question.lines:
            by_key[question.key].append(position)
    exact = {position: by_key[said.key] for position, said in enumerate(second.asked) if said.key in by_key}
    same = [(copy, position, 1.0) for position, copies in exact.items() for copy in copies]
    close = [pair for pair in _alike(first, second, near) if pair[1] not in exact]
    for kind, pairs in zip(_KINDS, (same, close), strict=True):
        shown: dict[int, tuple[str, str, float]] = {}
        for one, other, similarity in sorted(pairs, key=lambda pair: (-pair[2], pair[1], pair[0])):
            said = (first.records[one].source, second.records[other].source, round(similarity, 3))
            shown.setdefault(other, said)
        if shown:
            examples = tuple(list(shown.values())[:_SHOWN])
            rows = tuple(sorted({one for one, _, _ in pairs}))
            yield Overlap(kind, sides, train, test, len(shown), len(second.records), examples, rows)


def _alike(first: _Part, second: _Part, near: float) -> Iterator[tuple[int, int, float]]:
    """Yields (row of the first, row of the second, similarity) of all pairs at least `near` alike."""
    import numpy as np

    transposed = first.prefixes.T.tocsr()
    for start in range(0, len(second.records), _BLOCK):
        candidates = (second.prefixes[start : start + _BLOCK] @ transposed).tocoo()
        for chunk in range(0, candidates.nnz, _CHUNK):
            others = candidates.row[chunk : chunk + _CHUNK] + start
            ones = candidates.col[chunk : chunk + _CHUNK]
            shared = np.asarray(second.elements[others].multiply(first.elements[ones]).sum(axis=1)).ravel()
            similar = shared / (first.weights_N[ones] + second.weights_N[others] - shared)
            for at in np.flatnonzero(similar >= near):
                yield int(ones[at]), int(others[at]), float(similar[at])
