"""Copies what a comparison found into results/, without any text of its data sets.

    python benchmarks/publish.py runs/moa-small results/moa-small

The tables and the report are drawn again from the copied JSON, whose example answers are left out: they hold prompts
and references of data sets that are not ours to pass on.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from loramix.cli.main import run

KEPT = 4096
"""Characters of a text at most; anything longer would be data that slipped in."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("comparison", type=Path, help="output_dir of a finished comparison")
    parser.add_argument("folder", type=Path, help="where to")
    args = parser.parse_args()
    content = json.loads((args.comparison / "comparison.json").read_text(encoding="utf-8"))
    content["examples"] = []
    for one in content["overlap"]:
        one.pop("examples", None)
    _check(content, "comparison.json")
    args.folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(content, ensure_ascii=False, separators=(",", ":"))
    (args.folder / "comparison.json").write_text(text + "\n", encoding="utf-8")
    return run(["report", str(args.folder), "--out", str(args.folder / "report.html")])


def _check(content: Any, where: str) -> None:
    if isinstance(content, dict):
        for key, value in content.items():
            _check(value, f"{where}.{key}")
    elif isinstance(content, list):
        for number, value in enumerate(content):
            _check(value, f"{where}[{number}]")
    elif isinstance(content, str) and len(content) > KEPT:
        raise SystemExit(f"{where}: a text of {len(content)} characters. Is it data?")


if __name__ == "__main__":
    raise SystemExit(main())
