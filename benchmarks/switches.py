"""What does each fast form of training bring? A whole step with all of them, and with each of them switched off.

    OMP_NUM_THREADS=1 python benchmarks/switches.py [--methods lora moa mola] [--dropout 0.05] [--bf16] [--rounds 5]
        [--layers N] [--json] [--out FILE]

The built-in base, eight experts of rank 8 on all linear layers, eight rows of 70 to 512 tokens, half learned; types and
autocast as in step_profile.py. The sides take turns in one process; CPU time of the thread; ratios to the step with
everything on are taken within a round, medians and ranges of the rounds. Memory is the peak of a step's tensors above
what was there before it. `backend: concat` takes the experts of mosld and mola out of the frozen layers' products, and
with that modules are not worked out together either: compare it with `shared_inputs: false`.
"""

from __future__ import annotations

import argparse
import json
import os
from dataclasses import replace
from datetime import date
from pathlib import Path
from statistics import median
from typing import Any

import torch
from step_parts import plain_seconds
from step_profile import LENGTHS, METHODS
from tensor_peak import tensor_peak
from training_step import Point, TrainingStep, examples_of, first_layers

from loramix import load_base
from loramix.cli.output import quiet_libraries
from loramix.environment import environment

ALL = "everything on"
OFF: dict[str, dict[str, Any]] = {
    "padding_free: false": {"padding_free": False},
    "tokens_at_once: 0": {"tokens_at_once": 0},
    "head_chunk: 0": {"head_chunk": 0},
    "shared_inputs: false": {"shared_inputs": False},
    "lean_norms: false": {"lean_norms": False},
    "lean_activations: false": {"lean_activations": False},
    "backend: concat": {"backend": "concat"},
}
"""What is switched off, and how."""
PLAIN_BACKEND = ("mosld", "mola")
"""Methods that a plain backend changes: one expert is one LoRA in any, MoA and MixLoRA have forms of their own."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--methods", nargs="+", default=["lora", "moa", "mola"], choices=METHODS)
    parser.add_argument("--off", nargs="+", default=list(OFF), choices=list(OFF))
    parser.add_argument("--layers", type=int, default=0, help="the first layers of the base only; 0 for all")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dropout", type=float, default=0.0, help="of the adapters' input")
    parser.add_argument("--bf16", action="store_true", help="base in bfloat16, products in autocast")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    quiet_libraries()
    base = first_layers(load_base(dtype="bfloat16" if asked.bf16 else "float32"), asked.layers)
    report: dict[str, Any] = {
        "date": date.today().isoformat(),
        "environment": environment(),
        "threads": torch.get_num_threads(),
        "arguments": {name: value for name, value in vars(asked).items() if name not in ("json", "out")},
        "methods": {},
    }
    for method in asked.methods:
        point = Point(method=method, dropout=asked.dropout, bf16=asked.bf16)
        found = report["methods"][method] = compared(base, point, asked.off, asked.rounds)
        if not asked.json:
            show(method, found)
    text = json.dumps(report, indent=2)
    if asked.out:
        asked.out.write_text(text + "\n", encoding="utf-8")
    if asked.json:
        print(text)
    return 0


def compared(base: Any, point: Point, off: list[str], rounds: int) -> dict[str, dict[str, Any]]:
    """Returns each side's CPU seconds, their ratio to everything on, and the peak of its tensors in MiB."""
    words = base.config.vocab_size
    rows = [one for length in LENGTHS for one in examples_of(replace(point, rows=1, length=length), words)]
    rows = [replace(row, domain_id=place) for place, row in enumerate(rows)]
    steps, peaks, seconds = {}, {}, {}
    for side in (ALL, *(name for name in off if name != "backend: concat" or point.method in PLAIN_BACKEND)):
        changed = dict(OFF.get(side, {}))
        own = {name: changed.pop(name) for name in ("padding_free", "backend") if name in changed}
        steps[side] = TrainingStep(base, replace(point, **own), rows, **changed)
        steps[side]()  # makes the optimizer's state
        peaks[side] = tensor_peak(steps[side])
        seconds[side] = []
    for _ in range(rounds):
        for side, step in steps.items():
            seconds[side].append(plain_seconds(step))
    found = {}
    for side, own_seconds in seconds.items():
        ratios = [one / first for one, first in zip(own_seconds, seconds[ALL], strict=True)]
        found[side] = {
            "step_cpu_s": round(median(own_seconds), 3),
            "ratio": round(median(ratios), 3),
            "ratios": [round(min(ratios), 3), round(max(ratios), 3)],
            "peak_mib": round(peaks[side], 1),
        }
    return found


def show(method: str, found: dict[str, dict[str, Any]]) -> None:
    print(f"\n| {method} | s a step | times everything on | range | peak, MiB |\n|---|---:|---:|---:|---:|")
    for side, row in found.items():
        low, high = row["ratios"]
        print(
            f"| {side} | {row['step_cpu_s']:.2f} | {row['ratio']:.2f} | {low:.2f} to {high:.2f} | {row['peak_mib']} |"
        )


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    torch.set_num_threads(1)  # the clock is one thread's
    raise SystemExit(main())
