"""The rows of a comparison's table, with what was measured of their cells."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from loramix.comparison.measuring import OWN
from loramix.comparison.plan import Entry, Plan, short_name
from loramix.comparison.settings import Comparison


@dataclass
class Line:
    """One row of the table: a label in one setting, on one base, under one routing.

    Attributes:
        id: "moa/mixture", "moa/mixture/oracle", "base".
        held: domain -> hash of the examples it was measured on.
        asked: domains it was to be measured on, unseen ones aside.
        cells: seed -> domain (None for a cell of all domains) -> what was measured.
    """

    id: str
    base: str
    label: str
    method: str
    setting: str
    routing: str | None
    cells: dict[int, dict[str | None, dict[str, Any]]]
    entries: list[Entry]
    held: dict[str, str]
    asked: list[str]

    @property
    def row(self) -> str:
        """Its name without base: "moa/mixture", "moa/mixture/oracle"."""
        words = [self.label] + [self.setting] * (self.setting != "none")
        return "/".join([*words, *([self.routing] if self.routing is not None else [])])

    def stats(self, metric: str, domain: str) -> dict[int, list[list[float]]]:
        """Returns seed -> one vector for each example of a domain, for the seeds that have it."""
        found = {}
        for seed, by_domain in self.cells.items():
            measured = by_domain.get(domain, by_domain.get(None))
            part = (measured or {}).get("routings", {}).get(self.routing or OWN, {}).get(domain, {}).get(metric)
            if part is not None:
                found[seed] = part["stats"]
        return found

    def signatures(self, metric: str) -> set[str]:
        """Returns the signatures under which its domains were measured, unseen ones aside."""
        parts = (
            one["routings"].get(self.routing or OWN, {}).get(domain, {}).get(metric)
            for by_domain in self.cells.values()
            for one in by_domain.values()
            for domain in self.asked
        )
        return {part["signature"] for part in parts if part is not None}

    @property
    def measured(self) -> set[str]:
        """Domains it has any measurement of."""
        own = self.routing or OWN
        return {
            domain
            for by_domain in self.cells.values()
            for one in by_domain.values()
            for domain in one["routings"].get(own, {})
        }

    @property
    def first(self) -> dict[str, Any] | None:
        """What was measured of the cell of all domains, in the first seed that has it."""
        return next((cells[None] for cells in self.cells.values() if None in cells), None)


def lines_of(comparison: Comparison, planned: Plan, files: Mapping[str, Path]) -> list[Line]:
    """Returns a line for every row and setting on every base, and more for routings that were measured beside its own.

    Args:
        comparison: what was asked for.
        planned: its cells and where they belong.
        files: cell -> where its measurements lie if it is finished.
    """
    by_row: dict[tuple[str, str, str], list[Entry]] = defaultdict(list)
    for entry in planned.entries:
        by_row[entry.base, entry.label, entry.setting].append(entry)
    method_of = {row.label: row.method for row in comparison.rows}
    several = len(comparison.bases) > 1
    read: dict[str, dict[str, Any]] = {
        name: json.loads(file.read_text(encoding="utf-8")) for name, file in files.items() if file.is_file()
    }
    lines = []
    for (base, label, setting), entries in by_row.items():
        cells: dict[int, dict[str | None, dict[str, Any]]] = defaultdict(dict)
        for entry in entries:
            if entry.cell in read:
                cells[entry.seed][entry.domain] = read[entry.cell]
        name = "/".join(([short_name(base)] if several else []) + [label] + ([setting] if setting != "none" else []))
        planned_cells = [planned.cells[entry.cell] for entry in entries]
        held = {domain: digest for cell in planned_cells for domain, digest in cell.held.items()}
        asked = list(dict.fromkeys(domain for cell in planned_cells for domain in cell.domains))
        parts = (short_name(base), label, method_of[label], setting, None)
        line = Line(name, *parts, dict(cells), entries, held, asked)
        lines.append(line)
        for routing in ("oracle", "extracted"):
            if any(routing in one["routings"] for by_domain in cells.values() for one in by_domain.values()):
                lines.append(replace(line, id=f"{name}/{routing}", routing=routing))
    return lines
