"""Files and rows as public data sets have them: told by their keys, nothing lost, nothing else taken for them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from loramix.data.formats import to_records
from loramix.data.layouts import plain_text
from loramix.data.reading import read_file
from loramix.data.records import Record
from loramix.errors import Problems


def _one(row: Any) -> Record:
    (record,) = to_records(row, "file:1", "d", None)
    return record


def _read(path: Path) -> tuple[list[Record], list[str]]:
    problems = Problems("the data")
    return read_file(path, problems, domain="d"), problems.messages


PAIRS: dict[str, tuple[dict[str, Any], str, str]] = {
    "GSM8K": ({"question": "1 + 1?", "answer": "It is 2.\n#### 2"}, "1 + 1?", "It is 2.\n#### 2"),
    "CoNaLa": (
        {"intent": "join?", "rewritten_intent": "join list `x`", "snippet": "''.join(x)"},
        "join list `x`",
        "''.join(x)",
    ),
    "CoNaLa, not reworded": ({"intent": "join?", "rewritten_intent": None, "snippet": "s"}, "join?", "s"),
    "doctors": ({"question": "it hurts", "question_text": " It\n hurts. ", "answer": "rest"}, "It hurts.", "rest"),
    "doctors, title alone": ({"question": "it hurts", "question_text": " ", "answer": "rest"}, "it hurts", "rest"),
    "doctors, no text": ({"question": "it hurts", "question_text": None, "answer": "rest"}, "it hurts", "rest"),
    "Gorilla, no dict": (
        {"code": "{'Instruction': Find a cat's face., 'Output': {'x': 1}}", "api_call": "load('cat')", "provider": "P"},
        "Find a cat's face.",
        "load('cat')",
    ),
    "Gorilla, a dict": (
        {"code": "{'Instruction': 'Find a cat.', 'Output': {'x': 1}}", "api_call": "load('cat')", "provider": "P"},
        "Find a cat.",
        "load('cat')",
    ),
    "Gorilla, marked lines": (
        {"code": "###Instruction: Find a cat.\n###Output: x", "api_call": "load('cat')", "provider": "P"},
        "Find a cat.",
        "load('cat')",
    ),
    "LeetCode": (
        {
            "title_en": "Sum",
            "title_zh": "和",
            "description_en": "<p>Add <code>a</code> &lt; 10<sup>4</sup>.</p>",
            "description_zh": "<p>和</p>",
            "solution_py": "def f(): ...",
        },
        "Sum\n\nAdd a < 10^4.\n\nWrite a solution in Python.",
        "def f(): ...",
    ),
    "GAOKAO, choice": (
        {"question": "1 选\nA 一 B 二", "answer": ["A"], "analysis": " 一是一。\n", "year": "2020"},
        "1 选\nA 一 B 二",
        "【答案】A\n【解析】一是一。",
    ),
    "GAOKAO, several": (
        {"question": "1-2", "answer": ["A", "BD"], "analysis": "x"},
        "1-2",
        "【答案】A BD\n【解析】x",
    ),
    "GAOKAO, open": ({"question": "问", "answer": "答", "analysis": "析"}, "问", "答"),
    "preference": (
        {
            "input": {"messages": [{"role": "user", "content": "Q"}], "tools": []},
            "preferred_output": [{"role": "assistant", "content": "good"}],
            "non_preferred_output": [{"role": "assistant", "content": "bad"}],
        },
        "Q",
        "good",
    ),
    "ExpertQA": ({"example_id": 1, "context": "", "question": "Q?", "answer": "A"}, "Q?", "A"),
    "a question about a text": ({"context": " T ", "question": "Q?", "answer": "A"}, "T\n\nQ?", "A"),
}


@pytest.mark.parametrize("layout", PAIRS)
def test_layouts(layout):
    row, prompt, response = PAIRS[layout]
    record = _one(row)
    assert (record.prompt, record.response, record.choices) == (prompt, response, ())


@pytest.mark.parametrize("layout", [*PAIRS])
def test_layouts_keep_their_label(layout):
    row = PAIRS[layout][0]
    assert [r.domain for r in to_records({**row, "task": "t"}, "f:1", None, None)] == ["t"]
    assert [r.domain for r in to_records({**row, "subject": "s"}, "f:1", None, "subject")] == ["s"]


def test_options_with_an_analysis_or_a_context_are_a_choice():
    row = {"question": "Q", "choices": ["x", "y"], "answer": "B", "analysis": "because", "context": "T"}
    record = _one(row)
    assert (record.response, record.right) == ("B", 1)
    assert record.prompt.startswith("T\n\nQ\nA. x\n")


def test_same_question_with_other_answers_stays(tmp_path):
    path = tmp_path / "a.jsonl"
    rows = [{"question": "Q", "answer": answer} for answer in ("one", "two")]
    path.write_text("\n".join(map(json.dumps, rows)))
    assert [record.response for record in _read(path)[0]] == ["one", "two"]


def test_html_becomes_lines():
    html = "<p>Given&nbsp;<code>n</code>,\n return it.</p>\n<ul>\n\t<li> 1 &lt;= n</li>\n</ul>"
    html += "<pre><b>In:</b> 3\n  x\n</pre> a &"
    assert plain_text(html) == "Given n, return it.\n- 1 <= n\nIn: 3\n  x\na &"


def test_rows_under_example(tmp_path):
    path = tmp_path / "exam.json"
    path.write_text(json.dumps({"keywords": "k", "example": [PAIRS["GAOKAO, choice"][0], PAIRS["GAOKAO, open"][0]]}))
    records, problems = _read(path)
    assert [r.response for r in records] == ["【答案】A\n【解析】一是一。", "答"]
    assert not problems


def test_glaive_roles_are_the_assistants_and_the_tools():
    turns = [("human", "rain?"), ("function_call", '{"name": "w"}'), ("observation", "yes"), ("gpt", "Take a hat.")]
    row = {"conversations": [{"from": f, "value": v} for f, v in turns], "tools": '[{"name": "w"}]'}
    record = _one(row)
    assert [m.role for m in record.messages] == ["user", "assistant", "tool", "assistant"]
    assert record.tools == ({"name": "w"},)


FLAN = "Is ice cold?\\nOptions:\\n- yes\\n- no\tyes\tIce is frozen.  It's cold.\n"


def test_flans_tables_have_no_header(tmp_path):
    path = tmp_path / "cot.tsv"
    path.write_text("\ufeff" + FLAN + 'Is "fire cold?\tno\tFire burns things.\n' + "a\tb\n")
    records, problems = _read(path)
    assert [r.prompt for r in records] == ["Is ice cold?\nOptions:\n- yes\n- no", 'Is "fire cold?']
    assert records[0].response == "Ice is frozen.  It's cold.\nThe answer is yes."
    assert [r.source for r in records] == [f"{path}:1", f"{path}:2"]
    assert problems == [f"{path}:3: has 2 fields, expected question, answer, reason."]


@pytest.mark.parametrize(
    "header", ["query\tresponse\tsource", "instruction\toutput\tid", "Input\ttarget\twhy it is so"]
)
def test_a_header_of_three_columns_is_a_header(header, tmp_path):
    path = tmp_path / "a.tsv"
    path.write_text(f"{header.lower()}\nQ one\tA one\tx y\n")
    records, problems = _read(path)
    assert [(r.prompt, r.response) for r in records] == [("Q one", "A one")]
    assert not problems


def _mctest(folder: Path, answers: str | None, where: str = "MCTest") -> Path:
    (folder / "MCTest").mkdir()
    (folder / where).mkdir(exist_ok=True)
    stories = [
        f"mc9.train.{i}\tAuthor: x\tA dog{i} runs.\\newlineIt barks.\t"
        + "\t".join(f"{kind}: What{q}?\ta{q}\tb{q}\tc{q}\td{q}" for q, kind in enumerate(["one", "multiple"] * 2))
        for i in range(2)
    ]
    path = folder / "MCTest" / "mc9.train.tsv"
    path.write_text("\n".join(stories) + "\n")
    if answers is not None:
        (folder / where / "mc9.train.ans").write_text(answers)
    return path


@pytest.mark.parametrize("where", ["MCTest", "MCTestAnswers"])
def test_mctest_takes_its_answers_from_the_file_beside(where, tmp_path):
    records, problems = _read(_mctest(tmp_path, "A\tB\tC\tD\nD\tC\tB\tA\n", where))
    assert not problems
    assert [r.response for r in records] == list("ABCDDCBA")
    assert records[5].prompt == (
        "A dog1 runs.\nIt barks.\n\nWhat1?\nA. a1\nB. b1\nC. c1\nD. d1\nAnswer with the letter of the right option."
    )


@pytest.mark.parametrize(
    ("answers", "said"),
    [
        (None, "keeps its answers in mc9.train.ans, which is not there"),
        ("A\tB\tC\tD\n", "has 2 stories, but mc9.train.ans answers 1"),
        ("A\tB\tC\tD\nA\tB\tC\n", ":2: has 23 fields and 3 answers, expected 23 and 4"),
        ("A\tB\tC\tX\nA\tB\tC\tD\n", ":1: has the answer 'X', which names none"),
    ],
)
def test_mctest_without_its_answers(answers, said, tmp_path):
    problems = _read(_mctest(tmp_path, answers))[1]
    assert len(problems) == 1
    assert said in problems[0]


@pytest.mark.parametrize(
    ("text", "line"),
    [
        (b"a b\tno\tc d\n\xe9\tx\ty\n", 2),
        (b"prompt\tcompletion\n\xe9\tx\n", 2),
        (b"\xe9\n", 1),
        (b"mc9.dev.0\t\xe9\n", 1),
    ],
)
def test_tables_that_are_not_utf_8(text, line, tmp_path):
    path = tmp_path / "a.tsv"
    path.write_bytes(text)
    path.with_suffix(".ans").write_text("A\tB\tC\tD\n")
    problems = _read(path)[1]
    assert len(problems) == 1
    assert problems[0].startswith(f"{path}:{line}: is not UTF-8")
