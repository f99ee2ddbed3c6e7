"""The tables of a report as Markdown."""

from __future__ import annotations

from loramix.reports import abstention, quality_tables, run_tables
from loramix.reports.reading import Content
from loramix.reports.tables import Table


def all_tables(content: Content) -> list[Table]:
    """Returns all tables: results first, what the clock decides last."""
    results = [*quality_tables.quality(content), *quality_tables.as_in_moa(content), *quality_tables.paired(content)]
    about = [run_tables.overlap(content), run_tables.data(content), run_tables.signatures(content)]
    routing = [*run_tables.routers(content), *abstention.table(content)]
    made = [*results, *quality_tables.judge(content), *routing, *about, run_tables.cost(content)]
    return [table for table in made if table is not None]


def markdown(content: Content) -> str:
    """Returns all tables as Markdown."""
    said = [_plain(text) for text in (quality_tables.unmeasured(content),) if text]
    parts = [f"# {_plain(content['title'])}", *said, *(_markdown(table) for table in all_tables(content))]
    return "\n\n".join(parts) + "\n"


def _markdown(table: Table) -> str:
    lines = [f"## {_plain(table.title)}", ""]
    if table.note:
        lines += [_plain(table.note), ""]
    lines.append("| " + " | ".join(_plain(head) for head in table.heads) + " |")
    lines.append("|---|" + ("---|" if table.words else "---:|") * (len(table.heads) - 1))
    for row in table.rows:
        lines.append("| " + " | ".join(f"**{_plain(c.text)}**" if c.best else _plain(c.text) for c in row) + " |")
    return "\n".join(lines)


def _plain(text: str) -> str:
    """Returns a text that is nothing but text inside a Markdown table."""
    flat = " ".join(text.split())
    for character in "\\|*_`<>":
        flat = flat.replace(character, "\\" + character)
    return flat.replace("](", "]\\(")
