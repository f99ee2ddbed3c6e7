"""Which rows of tokens begin alike, so that their beginning needs to be read only once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

LEAST_SHARED = 8
"""Tokens that rows must have in common at least. For fewer a second forward costs more than it saves."""


@dataclass(frozen=True)
class Row:
    """What one row of a batch is fed: a context and all of a continuation but its last token.

    Attributes:
        fed: the tokens.
        context: how many of them are the context's, at least 1.
    """

    fed: tuple[int, ...]
    context: int


@dataclass(frozen=True)
class Group:
    """Rows that begin with the same tokens, none of them a continuation's."""

    shared: tuple[int, ...]
    rows: tuple[Row, ...]

    @property
    def saved(self) -> int:
        """How many tokens less are read than by each row for itself."""
        return len(self.shared) * (len(self.rows) - 1)


def grouped(rows: Sequence[Row], *, same_context: bool) -> tuple[list[Group], list[Row]]:
    """Returns groups of rows that share their beginning, and the rows left over, for which sharing does not pay.

    Rows of one context are a group. Where contexts may differ, neighbours among them (options that a tokenizer merged
    with the end of their question, questions behind the same examples) join where that saves more. What comes out does
    not depend on the order of the rows.

    Args:
        rows: distinct.
        same_context: whether rows may only share a whole context, because something follows from all of it (a router's
            decision).
    """
    by_context: dict[tuple[int, ...], list[Row]] = {}
    for row in rows:
        by_context.setdefault(row.fed[: row.context], []).append(row)
    groups: list[Group] = []
    for context in sorted(by_context):  # in this order contexts that begin alike are neighbours
        one = Group(context, tuple(by_context[context]))
        if groups and not same_context:
            both = _joined(groups[-1], one)
            if len(both.shared) >= LEAST_SHARED and both.saved > groups[-1].saved + one.saved:
                groups[-1] = both
                continue
        groups.append(one)
    worth = [group for group in groups if len(group.rows) > 1 and len(group.shared) >= LEAST_SHARED]
    taken = {row for group in worth for row in group.rows}
    return worth, [row for row in rows if row not in taken]


def _joined(one: Group, other: Group) -> Group:
    common = 0
    for a, b in zip(one.shared, other.shared, strict=False):
        if a != b:
            break
        common += 1
    return Group(one.shared[:common], one.rows + other.rows)
