"""Reads JSON that may come from anybody: no deeper than rows of data are."""

from __future__ import annotations

import json
from typing import Any

DEEPEST = 32
"""Of lists and objects in each other. Rows of public data sets need 5."""


class NotJson(ValueError):
    """A text is no JSON, or not such as is read.

    Args:
        reason: in a few words.
        line, column: where, from 1; 0 if that cannot be told.
    """

    def __init__(self, reason: str, line: int = 1, column: int = 0) -> None:
        super().__init__(reason)
        self.reason, self.line, self.column = reason, line, column


def parse_json(text: str) -> Any:
    """Returns the value of a JSON text.

    Raises:
        NotJson: with the place.
    """
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        raise NotJson(error.msg, error.lineno, error.colno) from error
    except RecursionError as error:
        raise NotJson("nested too deep") from error
    except ValueError as error:  # a number of more digits than Python reads
        raise NotJson(str(error).partition(":")[0].partition(";")[0]) from error
    if text.count("[") + text.count("{") > DEEPEST and _is_deeper(content, DEEPEST):
        raise NotJson(f"nested deeper than {DEEPEST} levels")
    return content


def _is_deeper(content: Any, levels: int) -> bool:
    """Returns whether there are more lists and objects in each other than that."""
    if not isinstance(content, dict | list):
        return False
    below = content.values() if isinstance(content, dict) else content
    return levels == 0 or any(_is_deeper(one, levels - 1) for one in below)
