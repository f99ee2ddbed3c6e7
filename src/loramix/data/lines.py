"""Lines of a file, none of them longer than a row of data can be: what has no line breaks is not read into memory."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

LONGEST = 8 << 20
"""Bytes of one line. The longest rows of public data sets have a tenth of it."""
TOO_LONG = f"is longer than the {LONGEST >> 20} MiB a row may have. Is it text, with line breaks? Split or remove it."


def lines_of(path: Path) -> Iterator[tuple[int, bytes | None]]:
    """Yields (number from 1, line); None in place of a line that is too long."""
    with path.open("rb") as file:
        number = 0
        while line := file.readline(LONGEST + 1):
            number += 1
            if len(line) <= LONGEST:
                yield number, line
                continue
            while line and not line.endswith(b"\n"):
                line = file.readline(LONGEST)
            yield number, None
