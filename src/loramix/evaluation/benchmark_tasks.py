"""Multiple-choice questions as tasks of lm-eval: JSON lines and a YAML beside them, readable without loramix."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from loramix.data.choices import LETTERS
from loramix.data.records import Record
from loramix.errors import DataError

OWN = "own"
"""The group of the tasks that ask a run's own questions."""
_VERSION = 1.0


def rows_of(records: Sequence[Record]) -> list[dict[str, Any]]:
    """Returns the fields a task can ask for, one row for each question.

    Fields: prompt and system (as in training), question (with what it is about, without the options), choices (the
    options' texts), letters (theirs), gold (the position of the right one), source (file and line).

    Raises:
        DataError: a record has no options, or more turns than one question and one answer.
    """
    rows = []
    for record in records:
        roles = [message.role for message in record.messages]
        if record.right is None or roles not in (["user", "assistant"], ["system", "user", "assistant"]):
            raise DataError(
                f"{record.source}: is no question with options and one answer, so it cannot be a benchmark's. Expected "
                "a multiple-choice row (docs/data.md)."
            )
        letters = list(LETTERS[: len(record.choices)])
        options = "\n".join(f"{letter}. {text}" for letter, text in zip(letters, record.choices, strict=True))
        question, found, _ = record.prompt.rpartition(f"\n{options}")
        rows.append(
            {
                "prompt": record.prompt,
                "system": record.messages[0].content if roles[0] == "system" else "",
                "question": question if found else record.prompt,
                "choices": list(record.choices),
                "letters": letters,
                "gold": record.right,
                "source": record.source,
            }
        )
    return rows


def write_tasks(folder: Path, domains: Mapping[str, Sequence[Record]]) -> list[str]:
    """Writes a task for each domain that has multiple-choice questions, and a group of all of them.

    A task `own_DOMAIN` asks the questions in the words of training and compares the letters' likelihoods: with
    `apply_chat_template=True` it is loramix's own multiple-choice score. The YAML names its data by an absolute path
    (lm-eval looks from where it is started), so write the tasks anew rather than move the folder.

    Args:
        folder: made if missing; `lm_eval --include_path FOLDER` finds the tasks.
        domains: name -> records; those without options are left out.

    Returns:
        The names of the tasks.

    Raises:
        DataError: no domain has a question with options.
    """
    folder = folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    names = []
    for domain, records in domains.items():
        asked = [record for record in records if record.choices]
        if not asked:
            continue
        names.append(f"{OWN}_{domain}")
        content = {
            "task": names[-1],
            **_local_data(folder, names[-1], asked),
            "test_split": "test",
            "output_type": "multiple_choice",
            "description": "system",
            "doc_to_text": "prompt",
            "doc_to_choice": "letters",
            "doc_to_target": "gold",
            "num_fewshot": 0,
            "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
            "metadata": {"version": _VERSION},
        }
        _write_yaml(folder / f"{names[-1]}.yaml", content)
    if not names:
        raise DataError(
            f"none of {', '.join(domains)} has held-out questions with options, so there is nothing to ask. Expected "
            "multiple-choice rows (docs/data.md); name another benchmark."
        )
    group = {
        "group": OWN,
        "task": names,
        "aggregate_metric_list": [{"metric": "acc", "aggregation": "mean", "weight_by_size": True}],
        "metadata": {"version": _VERSION},
    }
    _write_yaml(folder / f"{OWN}.yaml", group)
    return names


def with_data(folder: Path, name: str, task: Path, records: Sequence[Record]) -> Path:
    """Writes a task that is another one on local questions and returns its YAML file.

    Args:
        folder: for the YAML and the questions; made if missing.
        name: of the task.
        task: the YAML of the other one, which asks for fields of `rows_of`.
        records: all with options.
    """
    folder = folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.yaml"
    _write_yaml(path, {"include": str(task.resolve()), "task": name, **_local_data(folder, name, records)})
    return path


def _local_data(folder: Path, name: str, records: Sequence[Record]) -> dict[str, Any]:
    """Writes the questions and returns the part of a task's YAML that names them."""
    file = folder / f"{name}.jsonl"
    lines = (json.dumps(row, ensure_ascii=False) for row in rows_of(records))
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    where = {"data_files": {"test": str(file)}, "cache_dir": str(folder / "cache")}
    return {"dataset_path": "json", "dataset_name": None, "dataset_kwargs": where}


def _write_yaml(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(yaml.safe_dump(dict(content), sort_keys=False, allow_unicode=True), encoding="utf-8")
