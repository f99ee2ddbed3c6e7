"""Prints the stored figures of step_cost.py as the Markdown tables of docs/step-cost.md.

python benchmarks/step_table.py benchmarks/step_cost.json
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any


def cell(row: dict[str, Any] | None) -> str:
    """Returns "time / memory" of a row."""
    if row is None or row["step_ratio"] is None:
        return "-"
    return f"{row['step_ratio']:.2f} / {row['memory_ratio']:.2f}"


def table(rows: list[dict[str, Any]], targets: str) -> str:
    """Returns one table: a line for each method and form, a column for each number of experts."""
    experts = sorted({row["experts"] for row in rows if row["experts"] > 1})
    found: dict[str, dict[int, dict[str, Any]]] = {}
    for row in rows:
        if row["targets"] == targets:
            reads = " (router reads the running model)" if "running model" in row.get("note", "") else ""
            found.setdefault(f"{row['method']}{reads} | {row['form']}", {})[row["experts"]] = row
    lines = [
        "| method | form | " + " | ".join(f"E = {e}" for e in experts) + " |",
        "|---|---|" + "---|" * len(experts),
    ]
    for name, by_experts in found.items():
        alone = by_experts.get(1)
        cells = [cell(alone)] * len(experts) if alone else [cell(by_experts.get(e)) for e in experts]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Prints the tables."""
    report = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    for targets in dict.fromkeys(row["targets"] for row in report["rows"]):
        print(f"\n{targets}:\n\n{table(report['rows'], targets)}")


if __name__ == "__main__":
    main()
