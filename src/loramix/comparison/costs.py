"""What a row cost: parameters, time, tokens and memory, its experts' first stage included."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from loramix.comparison.plan import Cell, Entry
from loramix.comparison.runner import TRAINED


def cost_of(entries: Sequence[Entry], cells: Mapping[str, Cell], files: Mapping[str, Path]) -> dict[str, Any]:
    """Returns the mean cost of one seed of a row: time and tokens of all its cells and the cells they start from,
    parameters of one model, the largest memory of any.

    Args:
        entries: the row's, all seeds.
        cells: by name.
        files: cell -> where its measurements lie if it is finished.
    """
    finished = [entry for entry in entries if files[entry.cell].is_file()]
    seeds = {entry.seed for entry in finished}
    own = {entry.cell for entry in finished}
    trained = own | {name for cell in own for name in cells[cell].needs.values()}
    told = {name: _read(files[name].parent / TRAINED) for name in sorted(trained) if files[name].is_file()}
    stages = [one["stage"] for one in told.values() if one]
    parameters: dict[str, int] = next((told[name]["parameters"] for name in sorted(own) if told.get(name)), {})
    memory = [one["peak_memory_mb"] for one in told.values() if one and one["peak_memory_mb"] is not None]
    count = max(len(seeds), 1)
    measured = sum(_read(files[name])["seconds"] for name in own)
    return {
        "trained_parameters": parameters.get("trained", 0),
        "expert_parameters": parameters.get("experts", 0),
        "router_parameters": parameters.get("routers", 0),
        "train_seconds": round(sum(stage["seconds"] for stage in stages) / count, 1),
        "train_tokens": round(sum(stage["tokens"] for stage in stages) / count),
        "measure_seconds": round(measured / count, 1),
        "peak_memory_mb": max(memory, default=None),
    }


def _read(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    content: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return content
