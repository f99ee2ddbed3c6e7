"""Leaks between training and test data: copies and near copies are found, rows that are merely of one kind are not."""

from __future__ import annotations

import math
import os
import random
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loramix.data.choices import read_choice
from loramix.data.domains import Split
from loramix.data.overlap import asked, find_overlap, without_leaks
from loramix.data.reading import read_file
from loramix.data.records import Message, Record
from loramix.errors import Problems

SHARED = Path(os.environ.get("LORAMIX_SHARED_DATA", "/work/shared/data"))
shared = pytest.mark.skipif(
    not SHARED.is_dir(), reason=f"the real data sets are not in {SHARED} (LORAMIX_SHARED_DATA names their folder)"
)
LONG = "A farmer has {} hens. Each lays three eggs a day. He sells {} eggs at the market. How many are left for him?"


def _plain(prompt: str, source: str = "f:1") -> Record:
    return Record((Message("user", prompt), Message("assistant", "x")), "d", source)


def _choice(question: str, options: list[str], source: str = "f:1") -> Record:
    prompt, letter, choices = read_choice({"question": question, "choices": options, "answer": 0})
    return Record((Message("user", prompt), Message("assistant", letter)), "d", source, choices=choices)


def _found(train: Record, test: Record) -> list[tuple[str, int]]:
    return [(one.kind, one.count) for one in find_overlap({"d": Split([train], [test])})]


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("How old is Rome?", "how  old is\nROME"),
        ("Why?", "why"),
        ("x", "X."),
        ("火药是谁发明的。", "火药是谁发明的"),
        ("第 3 题: 火药是谁 发明的", "第3题、火药是谁发明的"),
        ("\uff26\uff35\uff2c\uff2c width", "full width"),
        ("???", "???"),
        ("What is a bond (in short)?", "What is a bond -- in short"),
    ],
)
def test_case_blanks_and_punctuation_do_not_hide_a_copy(one, other):
    assert _found(_plain(one), _plain(other)) == [("exact", 1)]


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (LONG.format("sixteen", "five"), LONG.format("sixteen", "five").replace("market", "fair")),
        (LONG.format(16, 5), "Q: " + LONG.format(16, 5)),
        (
            "19世纪中期以后中国市场上的洋货日益增多火柴洋布等用品虽穷乡僻壤求之于市必有所供这种状况表明了什么",
            "19世纪中期以后中国市场上的洋货日益增多火柴洋布等用品虽穷乡僻壤求之于市必有所供这种状况说明了什么",
        ),
    ],
)
def test_a_changed_word_leaves_a_near_copy(one, other):
    assert _found(_plain(one), _plain(other)) == [("near", 1)]


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("How old is Rome?", "How old is Paris?"),
        ("火药是谁发明的。", "指南针是谁发明的。"),
        ("Why?", "Who?"),
        ("What is 3 + 4?", "What is 3 - 4?"),
        ("", ""),
    ],
)
def test_other_questions_are_no_copies(one, other):
    assert _found(_plain(one), _plain(other)) == []


OPTIONS = ["a leg muscle relaxing", "bacteria in the blood", "particles on the skin", "sugars in the stomach"]


def test_a_question_with_its_options_in_another_order_is_found():
    question = "Which factor will most likely cause a person to develop a fever?"
    turned = [*OPTIONS[2:], *OPTIONS[:2]]
    assert [count for _, count in _found(_choice(question, OPTIONS), _choice(question, turned))] == [1]
    # The same as a plain prompt, as FLAN writes it.
    flan = "\n- ".join([f"{question}\nOptions:", *turned])
    assert _found(_choice(question, OPTIONS), _plain(flan)) == [("near", 1)]
    assert _found(_plain(flan), _choice(question, OPTIONS)) == [("near", 1)]


def test_the_template_of_options_is_not_compared():
    assert _found(_choice("What is it?", ["oak", "elm"]), _choice("Who was she?", ["Ada", "Eve"])) == []
    assert _found(_choice("Where?", ["1", "2"]), _choice("When?", ["3", "4"])) == []
    same = _choice("Which is true?", ["all of these", "none of these", "snow is warm", "fire is cold"])
    other = _choice("Which is true?", ["all of these", "none of these", "iron floats", "cork sinks"])
    assert _found(same, other) == []


TEMPLATE = (
    "You are a careful assistant of a bank. Read the question of the customer below, think about what the customer "
    "needs, and answer in one short sentence. Do not give advice on taxes or law. Question: "
)


def test_a_template_in_the_prompt_makes_no_copies():
    draw = random.Random(0)
    words = [f"word{i}" for i in range(300)]
    questions = [" ".join(draw.sample(words, 8)) for _ in range(60)]
    rows = [_plain(TEMPLATE + question) for question in questions]
    assert find_overlap({"bank": Split(rows[:40], rows[40:])}) == []
    # A copy with one word changed is still found behind it.
    changed = _plain(TEMPLATE + questions[0].replace(questions[0].split()[3], "else"))
    (found,) = find_overlap({"bank": Split(rows[:40], [*rows[40:], changed])}, near=0.6)
    assert (found.kind, found.count, found.rows) == ("near", 1, (0,))


def test_all_user_turns_are_compared():
    def talk(*turns: str) -> Record:
        said = [Message(role, text) for turn in turns for role, text in (("user", turn), ("assistant", "x"))]
        return Record(tuple(said), "d", "f:1")

    assert _found(talk("Hi", "What is a bond?"), talk("Hi", "Who was Ada?")) == []
    assert _found(talk("Hi", "What is a bond?"), talk("hi!", "What is a bond")) == [("exact", 1)]


_prompt = st.lists(st.sampled_from("abcdefghij"), min_size=0, max_size=7).map(" ".join)


@settings(max_examples=60, deadline=None)
@given(st.lists(_prompt, max_size=12), st.lists(_prompt, min_size=1, max_size=12), st.floats(0.05, 0.95))
def test_no_pair_is_missed(train, test, near):
    """Every pair compared in full gives the same rows."""
    splits = {"d": Split([_plain(one) for one in train], [_plain(one) for one in test])}
    sets = {side: [set(asked(r).elements()) for r in getattr(splits["d"], side)] for side in ("train", "test")}
    rows = Counter(element for one in sets["train"] + sets["test"] for element in one)
    weight = {element: math.log1p((len(train) + len(test)) / count) for element, count in rows.items()}

    def alike(one: set[str], other: set[str]) -> float:
        return sum(weight[e] for e in one & other) / max(sum(weight[e] for e in one | other), 1e-9)

    exact = {j for j, other in enumerate(test) if other and other in train}
    similar = {(i, j): alike(a, b) for i, a in enumerate(sets["train"]) for j, b in enumerate(sets["test"])}
    if any(abs(one - near) < 1e-6 for one in similar.values()):
        return  # on the very edge rounding decides
    wanted = {pair for pair, one in similar.items() if one >= near and pair[1] not in exact}
    found = {one.kind: one for one in find_overlap(splits, near=near)}
    assert ("exact" in found) == bool(exact)
    if exact:
        assert found["exact"].count == len(exact)
    assert ("near" in found) == bool(wanted)
    if wanted:
        assert set(found["near"].rows) == {i for i, _ in wanted}
        assert found["near"].count == len({j for _, j in wanted})


def _five() -> dict[str, Split]:
    """Two domains and one that is only measured: a's test row 1 is twice in a's training, b's test row 0 nearly in a's,
    and one training row is in both; the unseen domain has a row of b."""
    questions = [LONG.format(number, number + " times two") for number in ("seven", "eleven")]
    a = [_plain(prompt, f"a:{i}") for i, prompt in enumerate(["How old is Rome?", "Who wrote it?", "how old is rome"])]
    a += [_plain(questions[0], "a:3"), _plain("What grows on Mars?", "a:4")]
    b = [_plain("What grows on Mars", "b:0"), _plain("Name a prime number.", "b:1")]
    tests = [_plain("Where is Oslo?", "at:0"), _plain("How old is Rome?", "at:1")]
    return {
        "a": Split(a, tests),
        "b": Split(b, [_plain(questions[0].replace("market", "fair"), "bt:0")]),
        "unseen": Split([], [_plain("Name a prime number!", "u:0")]),
    }


def test_all_pairs_of_parts_are_compared():
    found = {(one.kind, one.sides, one.train, one.test): one for one in find_overlap(_five())}
    assert found.keys() == {
        ("exact", "train-test", "a", "a"),
        ("near", "train-test", "a", "b"),
        ("exact", "train-test", "b", "unseen"),
        ("exact", "train-train", "a", "b"),
    }
    twice = found["exact", "train-test", "a", "a"]
    assert (twice.count, twice.of, twice.rows) == (1, 2, (0, 2))
    assert [(e[1], e[2]) for e in twice.examples] == [("at:1", 1.0)]
    near = found["near", "train-test", "a", "b"]
    assert (near.count, near.of, near.rows) == (1, 1, (3,))
    assert near.examples[0][:2] == ("a:3", "bt:0")
    assert 0.7 < near.examples[0][2] < 1
    assert near.as_dict() == {
        "kind": "near",
        "sides": "train-test",
        "train": "a",
        "test": "b",
        "count": 1,
        "of": 1,
        "examples": [["a:3", "bt:0", near.examples[0][2]]],
    }
    assert found["exact", "train-train", "a", "b"].rows == (4,)


def test_training_rows_that_leak_are_left_out_and_nothing_else():
    splits = _five()
    clean = without_leaks(splits, find_overlap(splits))
    sources = {domain: [record.source for record in split.train] for domain, split in clean.items()}
    assert sources == {"a": ["a:1", "a:4"], "b": ["b:0"], "unseen": []}
    assert [split.test for split in clean.values()] == [split.test for split in splits.values()]
    assert [one.sides for one in find_overlap(clean)] == ["train-train"]
    assert [len(split.train) for split in splits.values()] == [5, 2, 0]  # the input stays as it was


def test_a_row_with_an_exact_copy_is_not_counted_as_near_too_and_examples_are_few():
    questions = [LONG.format(f"n{i}", f"m{i * 7}") for i in range(9)]
    train = [_plain(question, f"f:{i}") for i, question in enumerate(questions)]
    train.append(_plain(questions[0].replace("market", "fair"), "f:9"))
    found = find_overlap({"d": Split(train, [_plain(question) for question in questions])}, near=0.85)
    exact = next(one for one in found if one.kind == "exact")
    assert exact.count == 9
    assert len(exact.examples) == 5
    assert not [one for one in found if one.kind == "near" and one.count]


def test_the_similarity_asked_for_decides():
    splits = {"d": Split([_plain("red green blue white")], [_plain("red green blue black")])}
    assert find_overlap(splits) == []
    assert [one.kind for one in find_overlap(splits, near=0.3)] == ["near"]


def _rows(*names: str) -> list[Record]:
    problems = Problems("the shared data")
    records = [record for name in names for record in read_file(SHARED / name, problems, domain="d")]
    assert not problems.messages
    return records


@shared
def test_real_ecqa_is_commonsenseqa():
    ecqa = _rows("moa/flan_cot/ecqa_train.tsv")
    train = _rows("mosld/commonsenseqa/train_rand_split.jsonl")
    held = _rows("mosld/commonsenseqa/dev_rand_split.jsonl")
    found = find_overlap({"ecqa": Split(ecqa, []), "csqa": Split(train, held)})
    by_part = {(one.sides, one.train): one for one in found}
    # Counted by hand over question and sorted options: 6,318 of ECQA's 7,112 rows are CommonsenseQA's training rows and
    # the other 794 are its dev rows, which everybody tests on.
    assert by_part["train-test", "ecqa"].count == pytest.approx(794, abs=3)
    assert by_part["train-train", "ecqa"].count == pytest.approx(6318, abs=3)
    assert len({row for one in found if one.train == "ecqa" for row in one.rows}) >= 7110  # of 7,112
    # CommonsenseQA's own parts share a handful of questions that differ in one word at most.
    assert sum(one.count for one in found if one.train == "csqa") <= 5


@shared
def test_real_arc_easy_holds_test_questions_in_its_training_file():
    train, held = _rows("mosld/arc_easy/train.json"), _rows("mosld/arc_easy/test.json")
    same = {record.prompt for record in train} & {record.prompt for record in held}
    assert len(same) == 2
    exact, *near = find_overlap({"arc": Split(train, held)})
    assert exact.kind == "exact"
    assert 2 <= exact.count <= 3  # one more with its options in another order
    assert same <= {train[row].prompt for row in exact.rows}
    assert sum(one.count for one in near) < 20  # of 2,376


@shared
def test_real_fiqa_files_share_questions():
    first, second = _rows("moa/fiqa/fiqa_test_648.jsonl"), _rows("moa/fiqa/fiqa_finbertqa_test_pairs.jsonl")
    (found,) = find_overlap({"first": Split(first, []), "second": Split(second, [])})
    assert (found.kind, found.sides) == ("exact", "train-train")
    assert len({first[row].prompt for row in found.rows}) == 19


@shared
def test_real_questions_of_one_kind_are_no_copies():
    records = _rows("mosld/gsm8k/test.jsonl")
    # Two of 1,319 word problems tell the same story with other numbers.
    assert sum(one.count for one in find_overlap({"gsm8k": Split(records[:600], records[600:])})) <= 1
