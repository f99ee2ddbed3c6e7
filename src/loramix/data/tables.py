"""Reads files of separated values: with a header line, and two public data sets that have none."""

from __future__ import annotations

import csv
import re
from collections.abc import Callable, Iterator
from pathlib import Path

from loramix.data.formats import DOMAIN_COLUMNS, PROMPTS, RESPONSES
from loramix.data.lines import LONGEST, TOO_LONG, lines_of
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
    reader = csv.DictReader(_texts(path), delimiter=delimiter, strict=True)
    try:
        names = list(reader.fieldnames or [])
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise FileError("1", f"names {', '.join(map(repr, twice))} twice. Give each column a name of its own.")
        for row in reader:
            place = str(reader.line_num)
            if None in row or None in row.values():
                found = sum(row[name] is not None for name in names) + len(row.get(None) or [])
                yield place, FileError(place, f"has {found} fields, expected {len(names)} ({', '.join(names)}).")
            else:
                yield place, row
    except csv.Error as error:
        raise FileError(str(reader.line_num), f"cannot be read: {error}. Is a quote left open before it?") from error


def _texts(path: Path) -> Iterator[str]:
    """Yields the lines of a file, each with its end; a lone carriage return ends one too, as csv has it.

    Raises:
        FileError: one is too long, or is no text in UTF-8.
    """
    count = 0
    for _, raw in lines_of(path):
        if raw is None:
            raise FileError(str(count + 1), TOO_LONG)
        for line in raw.splitlines(keepends=True):
            count += 1
            if b"\0" in line:
                raise FileError(str(count), "holds a byte that is zero, which no text does. Save it as UTF-8.")
            try:
                yield line.decode("utf-8-sig" if count == 1 else "utf-8")
            except UnicodeDecodeError as error:
                said = f"is not UTF-8 ({error.reason} at byte {error.start}). Save it as UTF-8."
                raise FileError(str(count), said) from error


def _without_header(path: Path) -> Callable[[Path], Numbered] | None:
    """Returns the reader of a data set that has no header line, known by its first line; None for all other files."""
    with path.open(encoding="utf-8-sig", errors="replace") as lines:
        first = lines.readline(LONGEST)
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
    for number, line in enumerate(_texts(path), 1):
        fields = [field.replace("\\n", "\n") for field in line.rstrip("\r\n").split("\t")]
        if len(fields) != 3:
            said = f"has {len(fields)} fields, expected question, answer, reason."
            yield str(number), FileError(str(number), said)
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
