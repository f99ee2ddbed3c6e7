"""How far is `loramix validate --plan` off? Predicted against measured time and memory of a training step.

    OMP_NUM_THREADS=1 python benchmarks/plan_error.py [--methods lora moa mosld mola mixlora] [--rounds 3] [--json]
    OMP_NUM_THREADS=1 python benchmarks/plan_error.py --activation-checkpointing

The built-in base in fp32, eight experts of rank 8 on all linear layers, two rows of 256 tokens, half of each learned.
Measured: CPU seconds of a step, median, the methods in turn; the peak of a step's tensors above those there before it.
Predicted: FLOPs over this process's GEMM rate times the plan's one constant; the most bytes that are alive at any time.
`efficiency` is the constant that would have fitted.
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
from step_cost import tensor_peak
from training_step import Point, TrainingStep

from loramix import load_base
from loramix.cli.output import quiet_libraries
from loramix.experiment import build
from loramix.methods import METHODS
from loramix.models import load_skeleton
from loramix.planning.dry_run import dry_run
from loramix.planning.plan import EFFICIENCY, checkpoint_layers, gemm_rate, memory
from loramix.training.settings import TrainingSettings
from loramix.training.while_learning import while_learning

ROWS, LENGTH = 2, 256


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--methods", nargs="+", default=["lora", "moa", "mosld", "mola", "mixlora"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--activation-checkpointing", action="store_true", help="layers run again in the backward")
    parser.add_argument("--json", action="store_true")
    asked = parser.parse_args()
    quiet_libraries()
    base = load_base()
    steps = {name: TrainingStep(base, Point(method=name, rows=ROWS, length=LENGTH)) for name in asked.methods}
    settings = TrainingSettings(max_steps=1, activation_checkpointing=asked.activation_checkpointing)
    for step in steps.values():
        checkpoint_layers(step.model, settings)
    times: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(asked.rounds + 1):
        for name, step in steps.items():
            begun = time.process_time()
            step()
            if number:
                times[name].append(time.process_time() - begun)
    content = {"method": "lora", "output_dir": "unused", "data": {"domains": {"a": "x"}}}
    rate = gemm_rate(build(content).experiment)
    rows = [row(name, steps[name], median(times[name]), rate, settings) for name in steps]
    report = {"gemm_gflops": round(rate / 1e9, 1), "efficiency": EFFICIENCY, "rows": rows}
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


def row(name: str, step: TrainingStep, measured: float, rate: float, settings: TrainingSettings) -> dict[str, Any]:
    """Returns one method's figures."""
    step.step = step.__call__  # type: ignore[attr-defined]
    step.optimizer.zero_grad()
    peak = tensor_peak(step)  # type: ignore[arg-type]
    router = METHODS[name].router
    model = get_peft_model(load_skeleton().to(torch.float32), step.model.peft_config["default"]).train()
    checkpoint_layers(model, settings)
    told = router is not None and router.settled_by != "nothing"
    tokens, learned = ROWS * LENGTH, ROWS * LENGTH // 2
    with while_learning(model, settings, apart=False):
        dry = dry_run(model, tokens, learned, LENGTH, settings.head_chunk, told, by_row=True)
    sizes = memory(dry, model, settings, tokens, 0.5, several=False)
    predicted = sizes["activations"] / 2**20  # weights and Adam's state were there before
    seconds = dry.flops / (rate * EFFICIENCY)
    return {
        "name": name,
        "cpu_s": measured,
        "predicted_s": seconds,
        "time_error": seconds / measured - 1,
        "efficiency": dry.flops / rate / measured,
        "memory_mib": peak,
        "predicted_mib": predicted,
        "memory_error": predicted / peak - 1,
    }


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    torch.set_num_threads(1)
    raise SystemExit(main())
