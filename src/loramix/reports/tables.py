"""What a table is, what rows are called in tables and figures, and which of them compete."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from loramix.reports.reading import Content

NONE = "\u2013"


@dataclass(frozen=True)
class Cell:
    """One cell: its text, and whether it is the best of its kind."""

    text: str
    best: bool = False


@dataclass(frozen=True)
class Table:
    """A table. The first column names the rows.

    Attributes:
        title: a heading.
        note: how to read it, one or two sentences; may be empty.
        heads: of the columns.
        rows: cells, as many in each as there are heads.
        words: it holds words, not numbers.
    """

    title: str
    note: str
    heads: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    words: bool = False


def name_of(row: Mapping[str, Any]) -> str:
    """Returns what a row is called in tables: its label, setting and routing."""
    words = [row["label"], *{"none": [], "mixture": ["mixed"]}.get(row["setting"], ["single"])]
    if row["routing"] is not None:
        words.append({"oracle": "label's expert", "extracted": "experts alone"}.get(row["routing"], row["routing"]))
    return ", ".join(words)


def bases(content: Content) -> list[str]:
    """Returns the bases in the order of the rows."""
    return list(dict.fromkeys(row["base"] for row in content["rows"]))


def names(content: Content) -> dict[str, str]:
    """Returns row id -> what it is called; with the base's name where there are several."""
    several = len(bases(content)) > 1
    return {row["id"]: (f"{row['base']}: " if several else "") + name_of(row) for row in content["rows"]}


def pooled(content: Content, row: str) -> str:
    """Returns words for where a row's routers are those of several seeds: their prompts are counted together."""
    seeds = next((len(one["seeds"]) for one in content["rows"] if one["id"] == row), 1)
    return f" ({seeds} seeds together)" if seeds > 1 else ""


def competes(row: Mapping[str, Any]) -> bool:
    """Whether a row can be the best: it was trained, and nobody tells it the label."""
    return row["routing"] is None and row["setting"] != "none"


def spread(value: Mapping[str, Any] | None, digits: int) -> str:
    """Returns "26.9 ± 0.1", without the deviation where there is one seed."""
    if value is None:
        return NONE
    text = f"{value['mean']:.{digits}f}"
    return text if value["std"] is None else f"{text} ± {value['std']:.{digits}f}"
