"""Multiple choice: every shape gives the same record, by one template; an answer that names no option is refused."""

from __future__ import annotations

from typing import Any

import pytest

from loramix.data.formats import to_record, to_records
from loramix.data.records import Message
from loramix.data.row_error import RowError

OPTIONS = ["a spoon", "a drum", "a lamp"]
HUB = {"text": OPTIONS, "label": ["1", "2", "3"]}
PAIRS = [{"label": label, "text": text} for label, text in zip("ABC", OPTIONS, strict=True)]
ADAPTERS = (
    "Please choose the correct answer to the question: What is hit?\n\n"
    "Answer1: a spoon Answer2: a drum Answer3: a lamp\n\nAnswer format: answer1/answer2/answer3"
)
ASKED = "What is hit?\nA. a spoon\nB. a drum\nC. a lamp\nAnswer with the letter of the right option."
SHAPES: dict[str, dict[str, Any]] = {
    "list, position": {"question": "What is hit?", "choices": OPTIONS, "answer": 1},
    "list, letter": {"question": "What is hit?", "choices": OPTIONS, "answer": "B"},
    "list, small letter": {"question": "What is hit?", "choices": OPTIONS, "answer": " b"},
    "list, text": {"question": "What is hit?", "choices": OPTIONS, "answer": "a drum"},
    "options, label": {"question": "What is hit?", "options": OPTIONS, "label": 1},
    "Hub, labels that are numbers": {"id": "x", "question": "What is hit?", "choices": HUB, "answerKey": "2"},
    "CommonsenseQA": {"question": {"stem": "What is hit?", "choices": PAIRS}, "answerKey": "B", "id": "x"},
    "MMLU's csv": {"question": "What is hit?", **{f"choice{i}": o for i, o in enumerate(OPTIONS)}, "answer": "1"},
    "columns A to D, the last empty": {
        "question": " What is hit? ",
        **dict(zip("ABCD", [*OPTIONS, ""], strict=True)),
        "answer": "B",
    },
    "LLM-Adapters": {
        "instruction": ADAPTERS,
        "input": "",
        "output": "the correct answer is answer2",
        "answer": "answer2",
    },
}


@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_gives_the_same_record(shape):
    (record,) = to_records(SHAPES[shape], "file:1", "d", None)
    assert record.messages == (Message("user", ASKED), Message("assistant", "B"))
    assert (record.choices, record.right, record.source) == (tuple(OPTIONS), 1, "file:1")


@pytest.mark.parametrize("key", ["context", "article", "passage", "story"])
def test_what_a_question_is_about_comes_first(key):
    row = {key: "A drummer plays. \n", "question": "What is hit?", "options": OPTIONS, "answer": "B"}
    record = to_record(row, "file:1", "d", None)
    assert record.prompt == f"A drummer plays.\n\n{ASKED}"
    assert to_record({**row, key: " "}, "file:1", "d", None).prompt == ASKED


def test_race_gives_one_record_a_question():
    row = {
        "article": "A drummer plays.",
        "questions": ["What is hit?", "Who plays?"],
        "options": [OPTIONS, ["a king", "a drummer"]],
        "answers": ["B", "B"],
        "id": "x.txt",
        "domain": "reading",
    }
    first, second = to_records(row, "file:7", None, None)
    assert first.prompt == f"A drummer plays.\n\n{ASKED}"
    assert second.prompt.startswith("A drummer plays.\n\nWho plays?\nA. a king\nB. a drummer\n")
    assert [r.right for r in (first, second)] == [1, 1]
    assert [r.source for r in (first, second)] == ["file:7 (1)", "file:7 (2)"]
    assert [r.domain for r in (first, second)] == ["reading", "reading"]


def test_letters_go_by_position_whatever_the_labels():
    choices = {"text": ["x", "y", "z", "u", "v"], "label": list("ABCDE")[::-1]}
    record = to_record({"question": "Q", "choices": choices, "answerKey": "E"}, "file:1", "d", None)
    assert (record.response, record.right) == ("A", 0)


def test_options_that_are_numbers():
    row = {"question": "How many?", "choices": ["8", "1", "24"]}
    assert to_record({**row, "answer": "24"}, "f:1", "d", None).response == "C"  # the text: there is no position 24
    assert to_record({**row, "answer": "1"}, "f:1", "d", None).response == "B"
    assert to_record({**row, "answer": 2}, "f:1", "d", None).response == "C"


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "letter beyond": ({"answer": "D"}, "answer 'D', which names none of its 3 options"),
    "position beyond": ({"answer": 3}, "answer 3, which names none"),
    "before the first": ({"answer": -1}, "answer -1, which names none"),
    "truth value": ({"answer": True}, "answer True, which names none"),
    "a digit that is no number": ({"answer": "²"}, "which names none"),
    "another text": ({"answer": "a bell"}, "which names none"),
    "no answer": ({"answer": None}, "answer None, which names none"),
    "one option": ({"choices": ["a spoon"], "answer": 0}, "has 1 options"),
    "empty option": ({"choices": ["a spoon", " "], "answer": 0}, "some empty"),
    "options that are numbers": ({"choices": [1, 2], "answer": 0}, "no text"),
    "no question": ({"question": None, "answer": 0}, '"question" is no text'),
    "fewer texts than labels": (
        {"choices": {"text": ["x", "y"], "label": ["A", "B", "C"]}, "answer": "C"},
        "names none of its 2",
    ),
}


@pytest.mark.parametrize("what", WRONG)
def test_wrong_rows_are_refused(what):
    change, message = WRONG[what]
    with pytest.raises(RowError) as caught:
        to_record({"question": "What is hit?", "choices": OPTIONS, **change}, "file:1", "d", None)
    assert message in str(caught.value)


def test_what_has_no_numbered_options_stays_as_it_is():
    yes_no = {"instruction": "Is it so?\n\nAnswer format: true/false", "input": "", "output": "true", "answer": "true"}
    (record,) = to_records(yes_no, "file:1", "d", None)
    assert (record.prompt, record.response, record.choices) == (yes_no["instruction"], "true", ())
    assert record.right is None
    chat = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]
    row = {"messages": chat, "choices": ["x", "y"], "answer": "x"}
    assert to_record(row, "file:1", "d", None).response == "A"
    for choices in ([], None, {"text": None, "label": None}):
        row = {"question": "Q", "choices": choices, "answer": "A"}
        assert to_record(row, "file:1", "d", None).response == "A"
