"""What does a training step of each method cost, beside PEFT's LoRA and beside the same mixture as peers write it?

    python benchmarks/step_cost.py [--json] [--out FILE]
    python benchmarks/step_cost.py --targets q,v --experts 8 --methods mola hydralora --layers 2 --repetitions 1
    python benchmarks/step_cost.py --check          # do the peers' forms compute the same? seconds

A step is: forward with the loss as the trainer takes it (language model, and the method's own losses), backward, AdamW,
gradients dropped. On the built-in base in fp32, with random tokens; rank, targets, batch and step are the baseline's.
One process; the variants of a group take turns in a new random order in each repetition, after one step to warm up.

    step_ratio    CPU seconds of the step, divided by those of PEFT's LoRA in the same repetition; median
    wall_ratio    the same by the clock; on a machine with other work on it, CPU seconds are the better measure
    memory_ratio  peak memory of the step above what was there before (trained weights and Adam's state are), likewise

Dropout on the input (lora_dropout) is 0 everywhere. Methods that allot experts by layer have the same number in each.
Groups of many experts are built a few variants at a time, each time beside the baseline, to bound the memory.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import random
import sys
import time
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from statistics import median
from typing import Any

import torch
from peers_check import check
from step_variants import BASELINE, MAY_BE_MEASURED, MEASURED, TARGETS, Spec, Variant, built, specs

from loramix import load_base
from loramix.cli.output import quiet_libraries
from loramix.environment import environment

EXPERTS = (2, 8, 16, 64)
TOGETHER = 64
"""Experts of all variants that are in memory at the same time: 32 variants of 2, 1 of 64."""


@dataclass(frozen=True)
class Cost:
    """What one step took."""

    cpu_s: float
    wall_s: float
    peak_mib: float | None


class PeakMemory:
    """Linux's high-water mark of this process, reset before each step; not available elsewhere."""

    def __init__(self) -> None:
        try:
            self._reset()
            self.available = self._read("VmHWM") > 0
        except (OSError, ValueError):
            self.available = False

    def start(self) -> None:
        """Gives back what is free and begins anew."""
        gc.collect()
        if self.available:
            ctypes.CDLL(None).malloc_trim(0)
            self._reset()
            self.before = self._read("VmRSS")

    def above(self) -> float | None:
        """Returns the peak since `start` above what was there then, in MiB."""
        return (self._read("VmHWM") - self.before) / 1024 if self.available else None

    def _reset(self) -> None:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")

    def _read(self, name: str) -> int:
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
        return int(next(line for line in lines if line.startswith(f"{name}:")).split()[1])


def say(text: str) -> None:
    """Prints progress."""
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


def cost(variant: Variant, memory: PeakMemory) -> Cost:
    """Takes one step and returns what it took."""
    memory.start()
    wall, cpu = time.perf_counter(), time.process_time()
    variant.step()
    cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    peak = memory.above()
    variant.forget()
    return Cost(cpu, wall, peak)


def measure(group: list[Spec], base: Any, asked: argparse.Namespace, memory: PeakMemory) -> dict[Spec, list[Cost]]:
    """Builds the variants of a group and lets them take turns."""
    started = time.perf_counter()
    variants = [built(spec, base, asked.rows, asked.length) for spec in group]
    pick = random.Random(0)
    costs: dict[Spec, list[Cost]] = {spec: [] for spec in group}
    for repetition in range(-1, asked.repetitions):
        for variant in pick.sample(variants, len(variants)):
            taken = cost(variant, memory)
            if repetition >= 0:
                costs[variant.spec].append(taken)
    took = time.perf_counter() - started
    say(f"{group[0].targets}, {len(group)} variants up to {group[-1].label}: {took:.0f} s")
    return costs


def ratio(costs: list[Cost], baseline: list[Cost], of: str) -> tuple[float, float, float] | None:
    """Returns median, least and greatest of a cost over the baseline's in the same repetition."""
    pairs = [(getattr(one, of), getattr(other, of)) for one, other in zip(costs, baseline, strict=True)]
    ratios = [one / other for one, other in pairs if one is not None and other]
    return (median(ratios), min(ratios), max(ratios)) if ratios else None


def middle(costs: list[Cost], of: str, digits: int) -> float | None:
    """Returns the median of a cost, or None where it was not measured."""
    found = [getattr(one, of) for one in costs if getattr(one, of) is not None]
    return round(median(found), digits) if found else None


def row(spec: Spec, costs: list[Cost], baseline: list[Cost]) -> dict[str, Any]:
    """Returns the row of one variant; without costs, of one that was not run."""
    found: dict[str, Any] = {
        "method": spec.method,
        "form": spec.form,
        "targets": spec.targets,
        "experts": spec.experts,
        "rank": spec.rank,
        "top_k": spec.top_k,
    }
    for name, of in (("step_ratio", "cpu_s"), ("wall_ratio", "wall_s"), ("memory_ratio", "peak_mib")):
        ratios = ratio(costs, baseline, of) if costs else None
        found[name] = round(ratios[0], 3) if ratios else None
        if of == "cpu_s":
            found["step_ratio_range"] = [round(one, 3) for one in ratios[1:]] if ratios else None
    found |= {"cpu_s": middle(costs, "cpu_s", 3), "peak_mib": middle(costs, "peak_mib", 1)}
    if spec.note:
        found["note"] = spec.note
    return found


def shown(one: dict[str, Any]) -> str:
    """Returns a row as a line of the table."""
    numbers = [one[name] for name in ("step_ratio", "wall_ratio", "memory_ratio", "cpu_s")]
    cells = ["-" if number is None else f"{number:.2f}" for number in numbers]
    columns = f"{one['method']:20} {one['form']:15} {one['targets']:11}{one['experts']:>3} "
    return columns + " ".join(f"{cell:>7}" for cell in cells) + f"  {one.get('note', '')}"


def run(asked: argparse.Namespace, report: dict[str, Any]) -> None:
    """Measures group by group and puts what it finds into the report."""
    base = load_base()
    if asked.layers:
        base.model.layers = base.model.layers[: asked.layers]
        base.config.num_hidden_layers = asked.layers
    memory = PeakMemory()
    report["settings"]["memory"] = "VmHWM above VmRSS before the step" if memory.available else "not measured here"
    baselines: dict[str, list[Cost]] = {targets: [] for targets in asked.targets}
    for targets in asked.targets:
        for experts in asked.experts:
            waiting = []
            for spec in specs(asked.methods, targets, experts, asked.rank, experts == asked.experts[0]):
                needs = spec.gigabytes(base, asked.rows * asked.length)
                if needs <= asked.memory_limit:
                    waiting.append(spec)
                    continue
                note = f"not run: it would keep {needs:.0f} GiB for the backward pass"
                report["rows"].append(row(spec, [], []) | {"note": note})
                say(f"{spec.label} {note}")
            together = max(1, TOGETHER // experts)
            for start in range(0, len(waiting), together):
                some = waiting[start : start + together]
                plain = Spec("lora", BASELINE, targets, 1, asked.rank)
                costs = measure([plain, *some], base, asked, memory)
                baselines[targets] += costs[plain]
                for spec in some:
                    report["rows"].append(row(spec, costs[spec], costs[plain]))
                    say(shown(report["rows"][-1]))
                report["baseline"] = [
                    {
                        "form": BASELINE,
                        "targets": name,
                        "rank": asked.rank,
                        "steps": len(steps),
                        "cpu_s": middle(steps, "cpu_s", 3),
                        "wall_s": middle(steps, "wall_s", 3),
                        "peak_mib": middle(steps, "peak_mib", 1),
                    }
                    for name, steps in baselines.items()
                    if steps
                ]
                if asked.out:
                    asked.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def arguments() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--out", type=Path, help="write the JSON to this file too, anew after each group")
    parser.add_argument("--check", action="store_true", help="only compare the peers' forms with loramix")
    parser.add_argument("--methods", nargs="+", choices=MAY_BE_MEASURED, default=list(MEASURED))
    parser.add_argument("--targets", nargs="+", choices=list(TARGETS), default=list(TARGETS))
    parser.add_argument("--experts", nargs="+", type=int, default=list(EXPERTS))
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--rows", type=int, default=2, help="sequences in a batch")
    parser.add_argument("--length", type=int, default=256, help="tokens in a sequence")
    parser.add_argument("--layers", type=int, help="keep only the first layers of the base")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--memory-limit", type=float, default=10.0, help="GiB a variant may keep; others are not run")
    return parser.parse_args()


def main() -> None:
    """Measures and prints."""
    asked = arguments()
    quiet_libraries()
    torch.set_num_threads(asked.threads)
    if asked.check:
        print("\n".join(check()))
        return
    found = environment()
    settings = {name: getattr(asked, name) for name in ("rows", "length", "layers", "repetitions", "threads", "rank")}
    settings |= {
        "base": "built-in, fp32",
        "lora_dropout": 0.0,
        "lora_alpha": 2 * asked.rank,
        "optimizer": "AdamW, fused",
    }
    settings |= {"labels": "second half of each row", "allocation": "uniform"}
    report: dict[str, Any] = {
        "date": date.today().isoformat(),
        "machine": {name: found[name] for name in ("processor", "cores", "memory_gb", "platform", "python")},
        "torch": found["packages"]["torch"],
        "versions": found["packages"],
        "settings": settings,
        "baseline": [],
        "rows": [],
    }
    run(asked, report)
    report["load_average"] = [round(one, 1) for one in os.getloadavg()]
    if asked.out:
        asked.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    if asked.json:
        print(json.dumps(report, indent=1))
        return
    for one in report["baseline"]:
        peak = "peak not measured" if one["peak_mib"] is None else f"{one['peak_mib']:.0f} MiB"
        print(f"{BASELINE}, {one['targets']}: {one['cpu_s']:.2f} CPU s, {one['wall_s']:.2f} s, {peak} = 1.00")
    print(f"\n{'method':20} {'form':15} {'targets':11}{'E':>3}    step    wall  memory   CPU s")
    print("\n".join(shown(one) for one in report["rows"]))


if __name__ == "__main__":
    main()
