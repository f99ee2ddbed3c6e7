"""How far is `loramix validate --plan` off? Predicted against measured time and memory of a training step.

    OMP_NUM_THREADS=1 python benchmarks/plan_error.py [--methods lora moa mosld mola mixlora] [--rounds 3] [--json]
    OMP_NUM_THREADS=1 python benchmarks/plan_error.py --activation-checkpointing
    OMP_NUM_THREADS=1 python benchmarks/plan_error.py --bf16

The built-in base in fp32 (with --bf16 in bfloat16, products in autocast), eight experts of rank 8 on all linear layers,
two rows of 256 tokens, half of each learned. Measured: CPU seconds of a step, median, the methods in turn, each
followed by a prediction, whose median is shown; the peak of a step's tensors above those there before it. Predicted:
from true steps on four and eight of its layers, with random weights, as a plan measures them; without clipping, which
the measured step leaves out. Memory: the most bytes that are alive at any time.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from statistics import median
from typing import Any

import torch
from peft import get_peft_model
from tensor_peak import tensor_peak
from training_step import Point, TrainingStep

from loramix import load_base
from loramix.cli.output import quiet_libraries
from loramix.experiment import build
from loramix.methods import METHODS
from loramix.models import load_skeleton
from loramix.planning.dry_step import DryStep, long_row
from loramix.planning.layers_again import checkpoint_layers
from loramix.planning.plan import memory
from loramix.planning.seconds import Amount, Stopwatch
from loramix.planning.work import Work
from loramix.training.settings import TrainingSettings

ROWS, LENGTH = 2, 256


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--methods", nargs="+", default=["lora", "moa", "mosld", "mola", "mixlora"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--activation-checkpointing", action="store_true", help="layers run again in the backward")
    parser.add_argument("--bf16", action="store_true", help="base in bfloat16, products in autocast")
    parser.add_argument("--json", action="store_true")
    asked = parser.parse_args()
    quiet_libraries()
    base = load_base(dtype="bfloat16" if asked.bf16 else "float32")
    points = {name: Point(method=name, rows=ROWS, length=LENGTH, bf16=asked.bf16) for name in asked.methods}
    steps = {name: TrainingStep(base, point) for name, point in points.items()}
    settings = TrainingSettings(
        max_steps=1,
        per_device_train_batch_size=ROWS,
        max_grad_norm=0.0,
        activation_checkpointing=asked.activation_checkpointing,
        bf16=asked.bf16,
    )
    for step in steps.values():
        checkpoint_layers(step.model, settings)
    times: dict[str, list[float]] = {name: [] for name in steps}
    predicted: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(asked.rounds + 1):
        for name, step in steps.items():
            begun = time.process_time()
            step()
            if number:
                times[name].append(time.process_time() - begun)
                predicted[name].append(predicted_seconds(name, step, settings))
    rows = [row(name, steps[name], times[name], predicted[name], settings) for name in steps]
    report = {"rows": rows}
    if asked.json:
        print(json.dumps(report, indent=2))
    else:
        print("| | s a step | predicted | | MiB | predicted | |\n|---|---:|---:|---:|---:|---:|---:|")
        for one in rows:
            print(
                f"| {one['name']} | {one['cpu_s']:.2f} | {one['predicted_s']:.2f} | {one['time_error']:+.0%} | "
                f"{one['memory_mib']:.0f} | {one['predicted_mib']:.0f} | {one['memory_error']:+.0%} |"
            )
    return 0


def dry_step(settings: TrainingSettings) -> DryStep:
    """Returns the batch's step on shapes alone."""
    return DryStep(settings, long_row(settings, ROWS * LENGTH, 0.5, LENGTH))


def shapes_of(step: TrainingStep, settings: TrainingSettings) -> Any:
    """Returns the model on the meta device."""
    kind = torch.bfloat16 if settings.bf16 else torch.float32
    return get_peft_model(load_skeleton().to(kind), step.model.peft_config["default"]).train()


def predicted_seconds(name: str, step: TrainingStep, settings: TrainingSettings) -> float:
    """Returns a plan's seconds of one step, measured anew."""
    kind = "bfloat16" if settings.bf16 else "float32"
    content = {"method": "lora", "output_dir": "unused", "dtype": kind, "data": {"domains": {"a": "x"}}}
    watch = Stopwatch(build(content).experiment, step.examples)
    work = Work(step.model.peft_config["default"], settings, METHODS[name].losses, taught=True)
    amount, dry = Amount(ROWS * LENGTH, ROWS * LENGTH // 2, steps=1), dry_step(settings)
    seconds, note = watch.seconds(work, amount, dry(shapes_of(step, settings)), dry)
    if note:
        raise RuntimeError(note)
    return seconds


def row(
    name: str, step: TrainingStep, times: list[float], predicted: list[float], settings: TrainingSettings
) -> dict[str, Any]:
    """Returns one method's figures."""
    step.optimizer.zero_grad()
    peak = tensor_peak(step)
    model = shapes_of(step, settings)
    sizes = memory(dry_step(settings)(model), model, settings, ROWS * LENGTH, 0.5, several=False)
    mib = sizes["activations"] / 2**20  # weights and Adam's state were there before
    return {
        "name": name,
        "cpu_s": median(times),
        "predicted_s": median(predicted),
        "time_error": median(predicted) / median(times) - 1,
        "all_cpu_s": times,
        "all_predicted_s": predicted,
        "memory_mib": peak,
        "predicted_mib": mib,
        "memory_error": mib / peak - 1,
    }


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    torch.set_num_threads(1)
    raise SystemExit(main())
