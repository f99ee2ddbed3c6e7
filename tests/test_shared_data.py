"""The papers' real data, where a copy lies beside the repository: all of it reads, and its counts are those stated.

Nothing of the data is in the repository; the tests are skipped where it is not there (LORAMIX_SHARED_DATA names the
folder, by default ../shared/data beside the repository).
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from loramix.data.reading import READERS, read_named_for
from loramix.data.records import Record
from loramix.errors import Problems

DATA = Path(os.environ.get("LORAMIX_SHARED_DATA") or Path(__file__).parent.parent.parent / "shared" / "data")
pytestmark = pytest.mark.skipif(
    not (DATA / "README.md").is_file(), reason=f"no data in {DATA}; set LORAMIX_SHARED_DATA to a copy of them"
)

# Rows as the README beside the data states them, or SOURCE.txt (FLAN's and medicine's parts).
CHOICES = {
    "mosld/openbookqa/train.json": 4957,
    "mosld/openbookqa/test.json": 500,
    "mosld/commonsenseqa/train_rand_split.jsonl": 9741,
    "mosld/commonsenseqa/dev_rand_split.jsonl": 1221,
    "mosld/race/train_*.jsonl": 3660,
    "mosld/race/test_high.jsonl": 3498,
    "mosld/race/test_middle.jsonl": 1436,
    "mosld/mctest/MCTest/mc160.train.tsv": 280,
    "mosld/mctest/MCTest/mc160.dev.tsv": 120,
    "mosld/mctest/MCTest/mc160.test.tsv": 240,
    "mosld/mctest/MCTest/mc500.train.tsv": 1200,
    "mosld/mctest/MCTest/mc500.dev.tsv": 200,
    "mosld/mctest/MCTest/mc500.test.tsv": 600,
    "mosld/arc_easy/train.json": 2251,
    "mosld/arc_easy/validation_hf.json": 570,
    "mosld/arc_easy/test.json": 2376,
    "mosld/arc_challenge/train.json": 1119,
    "mosld/arc_challenge/test.json": 1172,
    "mosld/mmlu/dev/*.csv": 285,
    "mosld/mmlu/test/*.csv": 14042,
}
TEXTS = {
    "mosld/gsm8k/train.jsonl": 7473,
    "mosld/gsm8k/test.jsonl": 1319,
    "mosld/orca_sample/orca_dpo_pairs_validation.jsonl": 284,
    "moa/fiqa/fiqa_test_648.jsonl": 648,
    "moa/fiqa/fiqa_finbertqa_test_pairs.jsonl": 865,
    "moa/medical_qa/questionDoctorQAs.json": 5679,
    "moa/medical_qa/icliniqQAs.json": 465,
    "moa/medical_qa/ehealthforumQAs.json": 171,
    "moa/leetcode/leetcode.jsonl": 650,
    "moa/gaokao_bench/Objective_Questions/*.json": 1496,
    "moa/gaokao_bench/Subjective_Questions/*.json": 800,
    "moa/expertqa_lfqa/rand_lfqa_train.json": 1734,
    "moa/expertqa_lfqa/rand_lfqa_test.json": 219,
    "moa/gorilla_apibench/torchhub_train.json": 837,
    "moa/glaive_toolcall/glaive_toolcall_en_demo.json": 300,
    "moa/flan_cot/ecqa_train.tsv": 7112,
    "moa/flan_cot/strategyqa_train.tsv": 2061,
    "moa/flan_cot/qasc_train.tsv": 1084,
    "moa/conala/train.json": 2379,
    "moa/conala/examples.annotated.test.json": 500,
}


def _read(name: str) -> list[Record]:
    problems = Problems(name)
    records = read_named_for(str(DATA / name), "train", problems, domain="d")
    assert not problems, problems.messages[:5]
    return records


@pytest.mark.parametrize("name", CHOICES)
def test_multiple_choice(name):
    records = _read(name)
    assert len(records) == CHOICES[name]
    assert {len(r.choices) for r in records} <= {3, 4, 5}
    assert all(r.right in range(len(r.choices)) for r in records)
    letters = {r.response for r in records}
    assert {"A", "B", "C", "D"} <= letters <= set("ABCDE")
    assert all(f"{r.response}. {r.choices[r.right]}" in r.prompt.split("\n\n", 1)[-1] for r in records if r.choices)
    assert all(r.prompt.endswith("Answer with the letter of the right option.") for r in records)


@pytest.mark.parametrize("name", TEXTS)
def test_questions_with_texts(name):
    records = _read(name)
    assert len(records) == TEXTS[name]
    assert not any(r.choices for r in records)
    assert all(r.prompt.strip() and r.response.strip() for r in records)


def test_every_file_is_counted():
    files = {file for file in DATA.rglob("*") if file.suffix in READERS}
    counted = {file for name in (*CHOICES, *TEXTS) for file in DATA.glob(name)}
    assert counted == files


CONTEXTS = {"race/test_high.jsonl": 1045, "race/test_middle.jsonl": 362, "mctest/MCTest/mc500.test.tsv": 150}


@pytest.mark.parametrize("name", CONTEXTS)
def test_each_question_carries_its_passage(name):
    records = _read(f"mosld/{name}")
    passages = {r.prompt.rsplit("\n\n", 1)[0] for r in records}
    assert all("\n\n" in r.prompt for r in records)
    # some passages of RACE occur twice, and questions may hold empty lines: fewer or slightly more than files
    assert CONTEXTS[name] * 0.97 <= len(passages) <= CONTEXTS[name] * 1.03
    assert min(map(len, passages)) > 50


def test_answers_are_where_metrics_read_them():
    assert all(r.response.split("\n")[-1].startswith("#### ") for r in _read("mosld/gsm8k/test.jsonl"))
    exam = _read("moa/gaokao_bench/Objective_Questions/*.json")
    assert all(r.response.split("\n")[0].startswith("【答案】") for r in exam)
    assert all("【解析】" in r.response for r in exam)
    reasons = _read("moa/flan_cot/strategyqa_train.tsv")
    assert {r.response.split("\n")[-1] for r in reasons} == {"The answer is yes.", "The answer is no."}


def test_nothing_of_the_layout_is_left_in_the_text():
    code = _read("moa/leetcode/leetcode.jsonl")
    assert all(r.prompt.endswith("Write a solution in Python.") for r in code)
    assert not any("<p>" in r.prompt or "&nbsp;" in r.prompt for r in code)
    tools = _read("moa/gorilla_apibench/torchhub_train.json")
    assert not any("Instruction" in r.prompt or "Output'" in r.prompt for r in tools)
    assert all("torch.hub.load" in r.response for r in tools)
    stories = _read("mosld/mctest/MCTest/mc160.train.tsv")
    assert not any("\\newline" in r.prompt or "multiple: " in r.prompt for r in stories)
    science = _read("mosld/openbookqa/test.json")
    assert not any("Answer1" in r.prompt or "Please choose" in r.prompt for r in science)
    dialogues = _read("moa/glaive_toolcall/glaive_toolcall_en_demo.json")
    assert {m.role for r in dialogues for m in r.messages} == {"user", "assistant", "tool"}
    assert sum(bool(r.tools) for r in dialogues) > 100
