"""Loss curves by domain, read from the logs of cells."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from loramix.comparison.lines import Line
from loramix.comparison.plan import Plan
from loramix.run_folder import RunFolder


def curves_of(lines: Sequence[Line], planned: Plan, files: Mapping[str, Path]) -> dict[str, Any]:
    """Returns row id -> domain -> [[step, training loss], ...] of the row's first seed; "all" is the whole batch."""
    found: dict[str, Any] = {}
    for line in lines:
        if line.routing is not None or not line.cells:
            continue
        curves: dict[str, list[list[float]]] = {}
        for entry in line.entries:
            cell = planned.cells[entry.cell]
            if entry.seed != min(line.cells) or not files[cell.name].is_file():
                continue
            for name, points in _points(RunFolder(files[cell.name].parent).log).items():
                if name != "all" or entry.domain is None:
                    curves[name] = points
        if curves:
            found[line.id] = curves
    return found


def _points(log: Path) -> dict[str, list[list[float]]]:
    if not log.is_file():
        return {}
    points: dict[str, list[list[float]]] = {}
    for line in log.read_text(encoding="utf-8").splitlines():
        entry = json.loads(line)
        for key, value in entry.items():
            name = "all" if key == "loss" else key.removeprefix("loss/") if key.startswith("loss/") else None
            if name is not None:
                points.setdefault(name, []).append([entry["step"], round(float(value), 5)])
    return points
