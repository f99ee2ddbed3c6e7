"""Noisy, missing and needless labels: how many rows change, which, and that nothing else does."""

from __future__ import annotations

from collections import Counter

import pytest

from loramix.data.domains import Split
from loramix.data.records import Message, Record
from loramix.data.relabel import deal, flip_labels, hide_labels

WORDS = {"finance": "bond tax share broker", "medicine": "fever dose rash doctor", "law": "court judge appeal verdict"}


def _record(prompt: str, domain: str, source: str) -> Record:
    return Record((Message("user", prompt), Message("assistant", "x")), domain, source)


def _splits(train: int = 40, test: int = 10) -> dict[str, Split]:
    splits = {}
    for domain, said in WORDS.items():
        words = said.split()
        rows = [
            _record(f"{words[i % 4]} {words[(i + 1) % 4]} number {i}", domain, f"{domain}:{i}")
            for i in range(train + test)
        ]
        splits[domain] = Split(rows[:train], rows[train:])
    return splits


def _labels(splits) -> dict[str, str]:
    """Source -> the domain it is trained as; checks that no row is there twice and labels agree with the key."""
    found = {}
    for domain, split in splits.items():
        for record in (*split.train, *split.test):
            assert record.domain == domain
        for record in split.train:
            assert record.source not in found
            found[record.source] = domain
    return found


@pytest.mark.parametrize(("share", "moved"), [(0.0, 0), (0.1, 4), (0.3, 12), (1.0, 40)])
def test_flipped_labels(share, moved):
    splits = _splits()
    flipped = flip_labels(splits, share, seed=0)
    labels = _labels(flipped)
    assert labels.keys() == _labels(splits).keys()
    wrong = Counter(source.split(":")[0] for source, domain in labels.items() if not source.startswith(domain))
    assert wrong == Counter({domain: moved for domain in WORDS if moved})
    assert {domain: split.test for domain, split in flipped.items()} == {d: split.test for d, split in splits.items()}


def test_flipped_labels_go_to_all_others_and_follow_the_seed():
    splits = _splits(400)
    flipped = flip_labels(splits, 0.3, seed=0)
    went = Counter(record.source.split(":")[0] for record in flipped["law"].train)
    # 120 rows of each other domain move, half of them here; five standard deviations are 27.
    assert went["finance"] == pytest.approx(60, abs=27)
    assert went["medicine"] == pytest.approx(60, abs=27)
    assert flipped == flip_labels(splits, 0.3, seed=0)
    assert _labels(flipped) != _labels(flip_labels(splits, 0.3, seed=1))


@pytest.mark.parametrize(("share", "hidden"), [(0.25, 10), (0.5, 20), (0.99, 39)])
def test_rows_with_hidden_labels_are_dropped(share, hidden):
    splits = _splits()
    left, right = hide_labels(splits, share, 0, "drop")
    assert right is None
    assert {domain: len(split.train) for domain, split in left.items()} == dict.fromkeys(WORDS, 40 - hidden)
    assert all(domain == source.split(":")[0] for source, domain in _labels(left).items())
    assert [split.test for split in left.values()] == [split.test for split in splits.values()]
    assert left == hide_labels(splits, share, 0, "drop")[0]
    assert left != hide_labels(splits, share, 1, "drop")[0]


def test_rows_with_hidden_labels_are_labelled_by_a_classifier():
    splits = _splits()
    found, right = hide_labels(splits, 0.5, 0, "classify")
    assert right == 1.0  # the domains share no telling word
    assert _labels(found) == _labels(splits)


def test_the_share_of_right_labels_counts_what_the_classifier_got_wrong():
    splits = _splits()
    # Of law's rows half are about finance; the classifier cannot know.
    disguised = [
        _record(record.prompt, "law", f"law:{100 + i}") for i, record in enumerate(splits["finance"].train[:20])
    ]
    splits["law"] = Split([*splits["law"].train[:20], *disguised], splits["law"].test)
    found, right = hide_labels(splits, 0.5, 0, "classify")
    labels = _labels(found)
    assert len(labels) == 120
    wrong = [source for source, domain in labels.items() if not source.startswith(domain)]
    assert right == pytest.approx(1 - len(wrong) / 60)
    assert 0.7 < right < 1


def test_every_domain_keeps_a_row_with_its_label():
    left, _ = hide_labels(_splits(train=2), 0.99, 0, "drop")
    assert [len(split.train) for split in left.values()] == [1, 1, 1]


def test_a_domain_is_dealt_out():
    splits = _splits(41, 11)
    dealt = deal(splits, {"medicine": 3})
    assert list(dealt) == ["finance", "medicine 1", "medicine 2", "medicine 3", "law"]
    assert dealt["finance"] == splits["finance"]
    parts = [dealt[f"medicine {number}"] for number in (1, 2, 3)]
    assert [len(part.train) for part in parts] == [14, 14, 13]
    assert [len(part.test) for part in parts] == [4, 4, 3]
    labels = _labels(dealt)
    assert labels.keys() == _labels(splits).keys()
    tests = Counter(record.source for part in parts for record in part.test)
    assert tests == Counter(record.source for record in splits["medicine"].test)
    assert deal(splits, {}) == deal(splits, {"law": 1}) == splits
