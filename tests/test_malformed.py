"""Data files that are wrong are named by place and cause, soon, and without filling memory."""

from __future__ import annotations

import re
import time
import tracemalloc
from pathlib import Path

import pytest

from loramix.data.json_text import DEEPEST, NotJson, parse_json
from loramix.data.lines import LONGEST, lines_of
from loramix.data.reading import read_file
from loramix.errors import Problems
from tests.malformed import Malformed, malformed


@pytest.mark.parametrize("case", malformed(), ids=lambda case: case.name)
def test_a_malformed_file_is_named_by_place_and_cause(case: Malformed, tmp_path: Path):
    path = tmp_path / case.name
    path.write_bytes(case.content)
    problems = Problems("the data")
    started = time.monotonic()
    read_file(path, problems, domain="d")
    assert time.monotonic() - started < 5
    assert problems.messages
    assert [m[:300] for m in problems.messages if not re.match(re.escape(str(path)) + case.said, m)] == []


def test_a_line_that_never_ends_is_not_read_into_memory(tmp_path: Path):
    file = tmp_path / "a.jsonl"
    with file.open("wb") as opened:
        opened.seek(20 * LONGEST)
        opened.write(b'\n{"prompt": "a", "completion": "b"}\n')
    tracemalloc.start()
    found = list(lines_of(file))
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert [(number, line is None) for number, line in found] == [(1, True), (2, False)]
    assert most < 4 * LONGEST


def test_lines_end_where_they_do(tmp_path: Path):
    file = tmp_path / "a.txt"
    file.write_bytes(b"a\n\nb" + b"c" * (LONGEST - 2) + b"\n" + b"d" * LONGEST + b"\nlast")
    sizes = [(number, None if line is None else len(line)) for number, line in lines_of(file)]
    assert sizes == [(1, 2), (2, 1), (3, LONGEST), (4, None), (5, 4)]


def test_json_may_be_as_deep_as_said_and_no_deeper():
    assert parse_json("[" * DEEPEST + "1" + "]" * DEEPEST)
    with pytest.raises(NotJson, match="nested deeper"):
        parse_json("[" * (DEEPEST + 1) + "1" + "]" * (DEEPEST + 1))
    assert len(parse_json("[" + "[]," * 1000 + "{}]")) == 1001
