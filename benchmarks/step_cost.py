"""What does a training step of each method cost, beside PEFT's LoRA and beside the same mixture as peers write it?

    python benchmarks/step_cost.py [--json] [--out FILE]
    python benchmarks/step_cost.py --targets q,v --experts 8 --methods mola hydralora --layers 2 --repetitions 1
    python benchmarks/step_cost.py --check          # do the peers' forms compute the same? seconds

A step is: forward with the loss as the trainer takes it (language model, and the method's own losses), backward, AdamW,
gradients dropped. On the built-in base in fp32, with random tokens; rank, targets, batch and step are the baseline's.
One process; the variants of a group take turns in a new random order in each repetition, after a step that warms up.

    step_ratio    CPU seconds of the step, divided by those of PEFT's LoRA in the same repetition; median
    wall_ratio    the same by the clock; on a machine with other work on it, CPU seconds are the better measure
    memory_ratio  peak of a step's tensors above those there before it (trained weights and Adam's state are), from the
                  events of torch's allocator, divided by that of PEFT's LoRA; exact, so one step of each is enough
    resident_ratio  the same as the system sees it (VmHWM above VmRSS), median; in a process that has run other steps
                  before it varies by a third with the state of the heap, and is here for that reason only

Dropout on the input (lora_dropout) is 0 everywhere. Methods that allot experts by layer have the same number in each.
Groups of many experts are built a few variants at a time, each time beside the baseline, to bound the memory.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import math
import os
import random
import sys
import time
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from statistics import median
from typing import Any

import torch
from peers_check import check
from step_variants import BASELINE, MAY_BE_MEASURED, MEASURED, TARGETS, Spec, built, specs
from tensor_peak import tensor_peak

from loramix import load_base
from loramix.cli.output import quiet_libraries
from loramix.environment import environment
from loramix.experts.apply import BACKENDS

EXPERTS = (2, 8, 16, 64)
TOGETHER = 64
"""Experts of all variants that are in memory at the same time: 32 variants of 2, 1 of 64."""


@dataclass
class Costs:
    """What the steps of one variant took, by repetition, and the peak of its tensors in a step."""

    peak_mib: float
    cpu_s: list[float] = field(default_factory=list)
    wall_s: list[float] = field(default_factory=list)
    resident_mib: list[float] = field(default_factory=list)


class Resident:
    """Linux's high-water mark of this process, reset before a step; not available elsewhere."""

    def __init__(self) -> None:
        try:
            self._reset()
            self.libc = ctypes.CDLL(None)
            self.available = self._read("VmHWM") > 0 and hasattr(self.libc, "malloc_trim")
        except (OSError, StopIteration):
            self.available = False

    def start(self) -> None:
        """Gives back what is free and begins anew."""
        gc.collect()
        if self.available:
            self.libc.malloc_trim(0)
            self._reset()
            self.before = self._read("VmRSS")

    def above(self) -> list[float]:
        """Returns the peak since `start` above what was there then, in MiB; nothing where it is not available."""
        return [(self._read("VmHWM") - self.before) / 1024] if self.available else []

    def _reset(self) -> None:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")

    def _read(self, name: str) -> int:
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
        return int(next(line for line in lines if line.startswith(f"{name}:")).split()[1])


def say(text: str) -> None:
    """Prints progress."""
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


def measure(group: list[Spec], base: Any, asked: argparse.Namespace, resident: Resident) -> dict[Spec, Costs]:
    """Builds the variants of a group, takes a step of each for its memory, then lets them take turns for their time."""
    started = time.perf_counter()
    gc.collect()  # models refer to themselves: the last group goes only now
    variants = [built(spec, base, asked.rows, asked.length) for spec in group]
    costs = {}
    for variant in variants:
        variant.make_optimizer_state()
        costs[variant.spec] = Costs(tensor_peak(variant.step))
    pick = random.Random(0)
    for _ in range(asked.repetitions):
        for variant in pick.sample(variants, len(variants)):
            resident.start()
            wall, cpu = time.perf_counter(), time.process_time()
            loss = variant.step()
            costs[variant.spec].cpu_s.append(time.process_time() - cpu)
            costs[variant.spec].wall_s.append(time.perf_counter() - wall)
            costs[variant.spec].resident_mib += resident.above()
            assert math.isfinite(loss), f"{variant.spec.label}: loss {loss}"
    say(f"{len(group)} variants up to {group[-1].label}: {time.perf_counter() - started:.0f} s")
    return costs


def ratios(costs: Costs, baseline: Costs, of: str) -> list[float]:
    """Returns a cost over the baseline's in the same repetition."""
    return [one / other for one, other in zip(getattr(costs, of), getattr(baseline, of), strict=True)]


def middle(values: list[float], digits: int = 3) -> float | None:
    """Returns the median, or None where nothing was measured."""
    return round(median(values), digits) if values else None


def row(spec: Spec, costs: Costs | None, baseline: Costs | None) -> dict[str, Any]:
    """Returns the row of one variant; without costs, of one that was not run."""
    found: dict[str, Any] = {
        "method": spec.method,
        "form": spec.form,
        "targets": spec.targets,
        "experts": spec.experts,
        "rank": spec.rank,
        "top_k": spec.top_k,
    }
    measured = ("step_ratio", "step_ratio_range", "wall_ratio", "memory_ratio", "resident_ratio", "cpu_s", "peak_mib")
    found |= dict.fromkeys(measured)
    if costs is not None and baseline is not None:
        steps = ratios(costs, baseline, "cpu_s")
        found["step_ratio"] = middle(steps)
        found["step_ratio_range"] = [round(min(steps), 3), round(max(steps), 3)]
        found["wall_ratio"] = middle(ratios(costs, baseline, "wall_s"))
        found["memory_ratio"] = round(costs.peak_mib / baseline.peak_mib, 3)
        found["resident_ratio"] = middle(ratios(costs, baseline, "resident_mib"))
        found["cpu_s"] = middle(costs.cpu_s)
        found["peak_mib"] = round(costs.peak_mib, 1)
    if spec.note:
        found["note"] = spec.note
    return found


def in_all(targets: str, rank: int, measured: list[Costs]) -> dict[str, Any]:
    """Returns the baseline's own figures over all groups."""
    lists = ("cpu_s", "wall_s", "resident_mib")
    every = {of: [value for one in measured for value in getattr(one, of)] for of in lists}
    return {
        "form": BASELINE,
        "targets": targets,
        "rank": rank,
        "steps": len(every["cpu_s"]),
        "cpu_s": middle(every["cpu_s"]),
        "wall_s": middle(every["wall_s"]),
        "peak_mib": middle([one.peak_mib for one in measured], 1),
        "resident_mib": middle(every["resident_mib"], 1),
    }


def keep(report: dict[str, Any], found: dict[str, Any], asked: argparse.Namespace) -> None:
    """Puts a row into the report and shows it."""
    report["rows"].append(found)
    if asked.json:
        say(shown(found))
    else:
        print(shown(found), flush=True)


def shown(one: dict[str, Any]) -> str:
    """Returns a row as a line of the table."""
    names = ("step_ratio", "wall_ratio", "memory_ratio", "cpu_s")
    cells = ["-" if one[name] is None else f"{one[name]:.2f}" for name in names]
    columns = f"{one['method']:20} {one['form']:15} {one['targets']:11}{one['experts']:>3} "
    return columns + " ".join(f"{cell:>7}" for cell in cells) + f"  {one.get('note', '')}"


def run(asked: argparse.Namespace, report: dict[str, Any]) -> None:
    """Measures group by group and puts what it finds into the report."""
    base = load_base()
    if asked.layers:
        base.model.layers = base.model.layers[: asked.layers]
        base.config.num_hidden_layers = asked.layers
    resident = Resident()
    baselines: dict[str, list[Costs]] = {targets: [] for targets in asked.targets}
    for targets in asked.targets:
        for experts in asked.experts:
            waiting = []
            first = experts == asked.experts[0]
            for spec in specs(asked.methods, targets, experts, asked.rank, first, asked.backend):
                needs = spec.gigabytes(base, asked.rows * asked.length)
                if needs <= asked.memory_limit:
                    waiting.append(spec)
                    continue
                note = f"not run: it would keep {needs:.1f} GiB for the backward pass"
                keep(report, row(spec, None, None) | {"note": note}, asked)
            together = max(1, TOGETHER // experts)
            for start in range(0, len(waiting), together):
                some = waiting[start : start + together]
                plain = Spec("lora", BASELINE, targets, 1, asked.rank)
                costs = measure([plain, *some], base, asked, resident)
                baselines[targets].append(costs[plain])
                for spec in some:
                    keep(report, row(spec, costs[spec], costs[plain]), asked)
                report["baseline"] = [in_all(name, asked.rank, parts) for name, parts in baselines.items() if parts]
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
    parser.add_argument("--backend", choices=("auto", *BACKENDS), default="auto", help="of loramix's forms")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--memory-limit", type=float, default=6.0, help="GiB a form may keep, else not run")
    asked = parser.parse_args()
    if min(asked.experts) < 2:
        parser.error("--experts: expected at least 2 each; LoRA, which has one, is the baseline")
    return asked


def main() -> None:
    """Measures and prints."""
    asked = arguments()
    quiet_libraries()
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler's own lines
    torch.set_num_threads(asked.threads)
    if asked.check:
        print("\n".join(check()))
        return
    found = environment()
    named = ("rows", "length", "layers", "repetitions", "threads", "rank", "backend")
    settings = {name: getattr(asked, name) for name in named}
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
    if not asked.json:
        print(f"{'method':20} {'form':15} {'targets':11}{'E':>3}    step    wall  memory   CPU s", flush=True)
    run(asked, report)
    report["load_average"] = [round(one, 1) for one in os.getloadavg()]
    if asked.out:
        asked.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    if asked.json:
        print(json.dumps(report, indent=1))
        return
    for one in report["baseline"]:
        costs = f"{one['cpu_s']:.2f} CPU s, {one['wall_s']:.2f} s, {one['peak_mib']:.0f} MiB"
        print(f"1.00 = {BASELINE}, {one['targets']}: {costs}")


if __name__ == "__main__":
    main()
