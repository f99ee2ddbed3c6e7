"""Reads files of separated values: with a header line, and two public data sets that have none."""

from __future__ import annotations

import csv
import re
from collections.abc import Callable
from pathlib import Path

from loramix.data.row_error import FileError, Numbered

_MCTEST = re.compile(r"mc\d+\.\w+\.\d+\t")


def separated(delimiter: str) -> Callable[[Path], Numbered]:
    """Returns a reader of files separated by `delimiter`."""

    def read(path: Path) -> Numbered:
        with path.open(encoding="utf-8-sig", newline="") as lines:
            if delimiter == "\t":
                first = lines.readline()
                lines.seek(0)
                if _MCTEST.match(first):
                    yield from _mctest(path)
                    return
                if _is_flan(first):
                    yield from _flan(path)
                    return
            reader = csv.DictReader(lines, delimiter=delimiter)
            try:
                for row in reader:
                    place = str(reader.line_num)
                    if None in row or None in row.values():
                        found = sum(value is not None for value in row.values()) + len(row.get(None) or [])
                        names = reader.fieldnames or []
                        yield (
                            place,
                            FileError(place, f"has {found} fields, expected {len(names)} ({', '.join(names)})."),
                        )
                    else:
                        yield place, row
            except (csv.Error, UnicodeDecodeError) as error:
                raise FileError(str(reader.line_num + 1), f"cannot be read: {error}.") from error

    return read


def _is_flan(first: str) -> bool:
    """Whether a line is a row of FLAN's chain-of-thought files: three fields, and no word of a header among them."""
    fields = first.rstrip("\r\n").split("\t")
    heads = {"question", "prompt", "instruction", "text", "answer", "label", "rationale", "domain", "task", "output"}
    return len(fields) == 3 and not heads & {field.strip().lower() for field in fields}


def _flan(path: Path) -> Numbered:
    """FLAN v2's chain-of-thought submix: question, answer, rationale, without quoting; line breaks are written \\n."""
    with path.open(encoding="utf-8") as lines:
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
    letters = [line.split() for line in answers.read_text(encoding="utf-8").splitlines() if line.strip()]
    stories = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    if len(letters) != len(stories):
        raise FileError("1", f"has {len(stories)} stories, but {answers.name} answers {len(letters)}.")
    for number, (line, keys) in enumerate(zip(stories, letters, strict=True), 1):
        fields = [field.replace("\\newline", "\n").replace("\\tab", "\t").strip() for field in line.split("\t")]
        if len(fields) != 23 or len(keys) != 4:
            yield str(number), FileError(str(number), f"has {len(fields)} fields, expected 23 (a story, 4 questions).")
            continue
        for start, key in zip(range(3, 23, 5), keys, strict=True):
            question = re.sub(r"^(one|multiple): ", "", fields[start])
            options = fields[start + 1 : start + 5]
            yield str(number), {"context": fields[2], "question": question, "choices": options, "answer": key}
