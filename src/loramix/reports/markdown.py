"""The tables of a report as Markdown."""

from __future__ import annotations

from loramix.reports.reading import Content
from loramix.reports.tables import Table, all_tables


def markdown(content: Content) -> str:
    """Returns all tables as Markdown."""
    parts = [f"# {_plain(content['title'])}", *(_markdown(table) for table in all_tables(content))]
    return "\n\n".join(parts) + "\n"


def _markdown(table: Table) -> str:
    lines = [f"## {_plain(table.title)}", ""]
    if table.note:
        lines += [_plain(table.note), ""]
    lines.append("| " + " | ".join(_plain(head) for head in table.heads) + " |")
    lines.append("|---|" + "---:|" * (len(table.heads) - 1))
    for row in table.rows:
        lines.append("| " + " | ".join(f"**{_plain(c.text)}**" if c.best else _plain(c.text) for c in row) + " |")
    return "\n".join(lines)


def _plain(text: str) -> str:
    """Returns a text that is nothing but text inside a Markdown table."""
    flat = " ".join(text.split())
    for character in "\\|*_`<>[]":
        if character in "[]":
            continue
        flat = flat.replace(character, "\\" + character)
    return flat
