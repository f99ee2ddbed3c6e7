"""How do a training step's time and memory grow with experts, choices, rank, domains and length?

    OMP_NUM_THREADS=1 python benchmarks/scaling.py --out benchmarks/scaling.json [--axes rank] [--plot docs/images]

One axis at a time from the middle: 8 experts, 2 chosen, rank 8, all linear layers, 4 rows of 256 tokens. The base is
the built-in one with its first layers only (4 of 30), so its language-model head weighs more than in the whole. A step
is what `loramix train` takes: collation, forward, losses, backward, AdamW.

Some points at a time take turns, each time beside the same reference, one LoRA in the middle: a point's time is the
median of its ratios to the reference in the same round, times the reference's median over all rounds, in CPU seconds of
the thread. So a machine that gets slower between two groups does not bend a curve. Memory is the peak of a step's
tensors above those there before it (its gradients among them), plus the trained weights and Adam's state. Measured
points are kept in --out and not measured again. The exponent is the slope of a line through the logarithms of a
method's points: 0 does not grow, 1 grows with the axis.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import os
import time
from collections.abc import Sequence
from dataclasses import replace
from datetime import date
from pathlib import Path
from statistics import median
from typing import Any

import torch
from step_cost import say
from tensor_peak import MIB, tensor_peak
from training_step import Point, TrainingStep, first_layers

from loramix import load_base
from loramix.cli.output import quiet_libraries
from loramix.environment import environment
from loramix.reports import svg

ROUTED = ("moa", "mosld", "mola", "mixlora")
AXES: dict[str, tuple[Sequence[int], Sequence[str]]] = {
    "experts": ((1, 2, 4, 8, 16, 32, 64, 128, 256), ROUTED),
    "top_k": ((1, 2, 4), ("mosld", "mola", "mixlora")),
    "rank": ((4, 8, 16, 32, 64), ("lora", "moa", "mola")),
    "domains": ((2, 4, 8, 16, 32, 64), ("lora", "moa")),
    "length": ((128, 256, 512, 1024, 2048), ("lora", "moa", "mola")),
}
TITLES = {
    "experts": "experts", "top_k": "experts chosen for a token", "rank": "rank", "domains": "domains in a batch",
    "length": "tokens of a row",
}  # fmt: skip
AT_ONCE = 5
"""Points in memory at the same time, which take turns."""
REFERENCE = Point(method="lora")


def point(axis: str, value: int, method: str) -> Point:
    """Returns what is trained at one place of an axis."""
    middle = Point(method=method)
    if axis == "domains":  # as many rows, each of another domain where there are enough
        return replace(middle, experts=value, rows=8, length=128)
    if axis == "length":
        return replace(middle, rows=1, length=value)
    return replace(middle, **{axis: value}) if axis != "rank" else replace(middle, rank=value)


def points(axis: str) -> list[tuple[int, str]]:
    """Returns the places of an axis."""
    values, methods = AXES[axis]
    return [
        (value, method)
        for value in values
        for method in methods
        if not (axis == "experts" and value < 2 and method == "moa")
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--axes", nargs="+", default=list(AXES), choices=list(AXES))
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("runs/scaling.json"))
    parser.add_argument("--plot", type=Path, help="a folder for the pictures")
    parser.add_argument("--json", action="store_true")
    asked = parser.parse_args()
    quiet_libraries()
    report = json.loads(asked.out.read_text(encoding="utf-8")) if asked.out.is_file() else {"points": []}
    if report["points"] and report["layers"] != asked.layers:
        parser.error(
            f"{asked.out} holds points of {report['layers']} layers, asked for {asked.layers}. Name another file."
        )
    report |= {"date": date.today().isoformat(), "environment": environment(), "layers": asked.layers}
    base = first_layers(load_base(), asked.layers)
    for axis in asked.axes:
        have = {(one["value"], one["method"]) for one in report["points"] if one["axis"] == axis}
        missing = [place for place in points(axis) if place not in have]
        for start in range(0, len(missing), AT_ONCE):
            report["points"] += measured(base, axis, missing[start : start + AT_ONCE], asked.rounds)
            keep(report, asked.out)
    settle(report)
    report["exponents"] = [slope for axis in AXES for slope in exponents(report["points"], axis)]
    keep(report, asked.out)
    if asked.plot:
        for axis in {one["axis"]: None for one in report["points"]}:
            draw(report["points"], axis, asked.plot / f"scaling-{axis}.svg")
    print(json.dumps(report, indent=2) if asked.json else table(report))
    return 0


def measured(base: Any, axis: str, places: Sequence[tuple[int, str]], rounds: int) -> list[dict[str, Any]]:
    """Returns the figures of some places, which take turns with the reference."""
    reference = TrainingStep(base, REFERENCE)
    reference()
    steps = {place: TrainingStep(base, point(axis, *place)) for place in places}
    found: list[dict[str, Any]] = []
    for (value, method), step in steps.items():
        step()
        trained = sum(p.numel() for p in step.model.parameters() if p.requires_grad)
        memory = tensor_peak(step) + (4 + 8) * trained / MIB
        found.append(
            {"axis": axis, "value": value, "method": method, "trained": trained, "memory_mib": round(memory, 1)}
        )
    for one in found:
        one |= {"seconds": [], "reference_seconds": []}
    for _ in range(rounds):
        beside = seconds(reference)
        for one, step in zip(found, steps.values(), strict=True):
            one["seconds"].append(seconds(step))
            one["reference_seconds"].append(beside)
    for one in found:
        say(f"{axis} {one['value']} {one['method']}: {one['seconds']}, {one['memory_mib']} MiB")
    del steps
    gc.collect()
    return found


def seconds(step: TrainingStep) -> float:
    """Takes a step and returns the thread's CPU seconds."""
    begun = time.thread_time()
    step()
    return round(time.thread_time() - begun, 4)


def settle(report: dict[str, Any]) -> None:
    """Works out each point's time from its ratios to the reference."""
    every = [beside for one in report["points"] for beside in one["reference_seconds"]]
    report["reference_cpu_s"] = round(median(every), 4)
    for one in report["points"]:
        ratios = [a / b for a, b in zip(one["seconds"], one["reference_seconds"], strict=True)]
        one["ratio"] = round(median(ratios), 4)
        one["cpu_s"] = round(one["ratio"] * report["reference_cpu_s"], 4)


def keep(report: dict[str, Any], file: Path) -> None:
    """Writes what is known so far."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def exponents(found: Sequence[dict[str, Any]], axis: str) -> list[dict[str, Any]]:
    """Returns the slopes of an axis by method."""
    slopes = []
    for method in AXES[axis][1]:
        own = sorted((one["value"], one) for one in found if one["axis"] == axis and one["method"] == method)
        if len(own) > 1:
            slopes.append(
                {
                    "axis": axis,
                    "method": method,
                    **{name: _slope([(value, one[name]) for value, one in own]) for name in ("cpu_s", "memory_mib")},
                    "from_to": [own[0][0], own[-1][0]],
                    "cpu_ratio": round(own[-1][1]["cpu_s"] / own[0][1]["cpu_s"], 2),
                    "memory_ratio": round(own[-1][1]["memory_mib"] / own[0][1]["memory_mib"], 2),
                }
            )
    return slopes


def _slope(pairs: Sequence[tuple[float, float]]) -> float:
    x, y = ([math.log(pair[i]) for pair in pairs] for i in (0, 1))
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    over = sum((a - mean_x) ** 2 for a in x)
    return round(sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True)) / over, 2)


def table(report: dict[str, Any]) -> str:
    """Returns the exponents as Markdown."""
    lines = ["| axis | method | from, to | time | exponent | memory | exponent |", "|---|---|---|---:|---:|---:|---:|"]
    for one in report["exponents"]:
        first, last = one["from_to"]
        lines.append(
            f"| {TITLES[one['axis']]} | {one['method']} | {first}, {last} | {one['cpu_ratio']} x | {one['cpu_s']} | "
            f"{one['memory_ratio']} x | {one['memory_mib']} |"
        )
    return "\n".join(lines)


def draw(found: Sequence[dict[str, Any]], axis: str, file: Path) -> None:
    """Writes the picture of an axis: time and memory."""
    with svg.style():
        drawn = svg.figure(7.2, 2.7)
        for number, (name, label) in enumerate((("cpu_s", "CPU seconds a step"), ("memory_mib", "MiB"))):
            axes = drawn.add_subplot(1, 2, number + 1)
            for method, marker, colour in zip(("lora", *ROUTED), "os^Dv", svg.SERIES, strict=False):
                own = sorted((o["value"], o[name]) for o in found if o["axis"] == axis and o["method"] == method)
                if own:
                    axes.plot(*zip(*own, strict=True), marker=marker, color=colour, label=method, linewidth=1.6)
            axes.set_xscale("log", base=2)
            # From nothing, so that noise does not look like growth.
            axes.set_ylim(0, 1.15 * max(one[name] for one in found if one["axis"] == axis))
            ticks = list(AXES[axis][0])[:: 2 if len(AXES[axis][0]) > 6 else 1]
            axes.set_xticks(ticks, [f"{tick}" for tick in ticks])
            axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}" if value < 10 else f"{value:.0f}")
            axes.set_xlabel(TITLES[axis])
            axes.set_ylabel(label)
            if number == 0:
                axes.legend(frameon=False)
        file.parent.mkdir(parents=True, exist_ok=True)
        drawn.savefig(file, format="svg", facecolor="white", metadata={"Date": None})


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    torch.set_num_threads(1)
    raise SystemExit(main())
