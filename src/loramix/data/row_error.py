"""What is wrong with one row, or with one place in a file."""

from collections.abc import Iterator
from typing import Any

Numbered = Iterator[tuple[str, Any]]
"""(place such as "line 3", row)"""


class RowError(ValueError):
    """What is wrong with one row; the reader adds file and line."""


class FileError(ValueError):
    """A place in a file that cannot be read, and why."""

    def __init__(self, place: str, reason: str) -> None:
        super().__init__(f"{place}: {reason}")
        self.place = place
        self.reason = reason
