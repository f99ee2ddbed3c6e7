"""Reads files of separated values: with a header line, and two public data sets that have none."""

from __future__ import annotations

import csv
import re
from collections.abc import Callable
from pathlib import Path

from loramix.data.formats import DOMAIN_COLUMNS, PROMPTS, RESPONSES
from loramix.data.row_error import FileError, Numbered

_MCTEST = re.compile(r"mc\d+\.\w+\.\d+\t")
_HEADS = {*PROMPTS, *RESPONSES, *DOMAIN_COLUMNS, "text", "label", "rationale", "context"}


def separated(delimiter: str) -> Callable[[Path], Numbered]:
    """Returns a reader of files separated by `delimiter`."""

    def read(path: Path) -> Numbered:
        layout = _without_header(path) if delimiter == "\t" else None
        try:
            yield from _with_header(path, delimiter) if layout is None else layout(path)
        except UnicodeDecodeError as error:
            raise FileError("1", f"is not UTF-8 ({error.reason}). Save it as UTF-8.") from error

    return read


def _with_header(path: Path, delimiter: str) -> Numbered:
    with path.open(encoding="utf-8-sig", newline="") as lines:
        reader = csv.DictReader(lines, delimiter=delimiter)
        try:
            for row in reader:
                place = str(reader.line_num)
                if None in row or None in row.values():
                    found = sum(value is not None for value in row.values()) + len(row.get(None) or [])
                    names = reader.fieldnames or []
                    yield place, FileError(place, f"has {found} fields, expected {len(names)} ({', '.join(names)}).")
                else:
                    yield place, row
        except (csv.Error, UnicodeDecodeError) as error:
            raise FileError(str(reader.line_num + 1), f"cannot be read: {error}.") from error


def _without_header(path: Path) -> Callable[[Path], Numbered] | None:
    """Returns the reader of a data set that has no header line, known by its first line; None for all other files."""
    with path.open(encoding="utf-8-sig", errors="replace") as lines:
        first = lines.readline()
    if _MCTEST.match(first):
        return _mctest
    return _flan if _is_flan(first) else None


def _is_flan(first: str) -> bool:
    """Whether a line is a row of FLAN's chain-of-thought files: three fields, two of them sentences, not a header."""
    fields = [field.strip() for field in first.split("\t")]
    sentences = len(fields) == 3 and " " in fields[0] and " " in fields[2]
    return sentences and not _HEADS & {field.lower() for field in fields}


def _flan(path: Path) -> Numbered:
    """FLAN v2's chain-of-thought submix: question, answer, rationale, without quoting; line breaks are written \\n."""
    with path.open(encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, 1):
            fields = [field.replace("\\n", "\n") for field in line.rstrip("\r\n").split("\t")]
            if len(fields) != 3:
                yield (
                    str(number),
                    FileError(str(number), f"has {len(fields)} fields, expected question, answer, reason."),
                )
                continue
            question, answer, reason = fields
            yield str(number), {"prompt": question, "completion": f"{reason.strip()}\nThe answer is {answer.strip()}."}


def _mctest(path: Path) -> Numbered:
    """MCTest: id, author, story, then four times a question and four options; letters in the .ans file beside it (of
    the test sets: in ../MCTestAnswers)."""
    beside = [path.with_suffix(".ans"), path.parent.parent / "MCTestAnswers" / path.with_suffix(".ans").name]
    answers = next((file for file in beside if file.is_file()), None)
    if answers is None:
        raise FileError(
            "1", f"MCTest keeps its answers in {beside[0].name}, which is not there. Put it beside the file."
        )
    letters = [line.split() for line in answers.read_text(encoding="utf-8-sig").split("\n") if line.strip()]
    stories = [line for line in path.read_text(encoding="utf-8-sig").split("\n") if line.strip()]
    if len(letters) != len(stories):
        raise FileError("1", f"has {len(stories)} stories, but {answers.name} answers {len(letters)}.")
    for number, (line, keys) in enumerate(zip(stories, letters, strict=True), 1):
        fields = [field.replace("\\newline", "\n").replace("\\tab", "\t").strip() for field in line.split("\t")]
        if len(fields) != 23 or len(keys) != 4:
            said = f"has {len(fields)} fields and {len(keys)} answers, expected 23 and 4 (a story, 4 questions)."
            yield str(number), FileError(str(number), said)
            continue
        for start, key in zip(range(3, 23, 5), keys, strict=True):
            question = re.sub(r"^(one|multiple): ", "", fields[start])
            options = fields[start + 1 : start + 5]
            yield str(number), {"context": fields[2], "question": question, "choices": options, "answer": key}
