"""What do lean norms and lean activations gain in a whole training step?

    OMP_NUM_THREADS=1 python benchmarks/lean_blocks.py [--rounds 5] [--layers N] [--methods ...] [--json]

The built-in base in fp32, eight experts of rank 8 on all linear layers, four rows of 256 tokens, half learned. Sides
take turns in one process; CPU time of the thread; ratios to the base's own code are taken within a round, medians of
the rounds. The third figure is what the base's element-by-element work takes of a step, each operation timed: on a busy
machine it says more than the whole step does. Memory is what the forward keeps for the backward, weights left out, each
storage once.
"""

from __future__ import annotations

import argparse
import json
import os
from statistics import median
from typing import Any

import torch
from step_parts import parts_of, plain_seconds
from step_profile import METHODS, saved
from training_step import Point, TrainingStep, first_layers

from loramix import load_base
from loramix.cli.output import quiet_libraries

SIDES = {
    "the base's own": {"lean_norms": False, "lean_activations": False},
    "lean norms": {"lean_norms": True, "lean_activations": False},
    "lean activations": {"lean_norms": False, "lean_activations": True},
    "both": {"lean_norms": True, "lean_activations": True},
}
OWN = next(iter(SIDES))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--methods", nargs="+", default=["lora", "mola"], choices=METHODS)
    parser.add_argument("--layers", type=int, default=0, help="the first layers of the base only; 0 for all")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    asked = parser.parse_args()
    quiet_libraries()
    base = first_layers(load_base(), asked.layers)
    found = {}
    for method in asked.methods:
        found[method] = compared(base, method, asked.rounds)
        for side, row in found[method].items() if not asked.json else ():
            print(f"{method:8} {side:17} {row['step_cpu_s']:8.3f} s {row['time']:7.3f} x", end="")
            print(f" {row['base_other_s']:8.4f} s {row['kept_mib']:8.1f} MiB {row['memory']:7.3f} x", flush=True)
    if asked.json:
        print(json.dumps(found, indent=2))
    return 0


def compared(base: Any, method: str, rounds: int) -> dict[str, dict[str, float]]:
    """Returns each side's CPU seconds, those of the base's element-by-element work, and MiB kept for the backward."""
    steps = {side: TrainingStep(base, Point(method=method), **lean) for side, lean in SIDES.items()}
    kept = {side: sum(saved(step, step.batch()).values()) for side, step in steps.items()}
    times: dict[str, list[float]] = {side: [] for side in SIDES}
    others: dict[str, list[float]] = {side: [] for side in SIDES}
    for number in range(rounds):
        for side, step in list(steps.items())[:: -1 if number % 2 else 1]:
            times[side].append(plain_seconds(step))
            others[side].append(parts_of(step, base)["base, other"])
    return {
        side: {
            "step_cpu_s": round(median(times[side]), 3),
            "time": round(median(a / b for a, b in zip(times[side], times[OWN], strict=True)), 3),
            "base_other_s": round(median(others[side]), 4),
            "kept_mib": round(kept[side], 1),
            "memory": round(kept[side] / kept[OWN], 3),
        }
        for side in SIDES
    }


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    torch.set_num_threads(1)  # the clock is one thread's
    raise SystemExit(main())
