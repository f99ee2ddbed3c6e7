"""Would the experts of stage 1 train faster together, all their rows in one pass of the base, than one after another?

    OMP_NUM_THREADS=1 python benchmarks/joint_experts.py [--rows 4] [--rounds 5] [--json]

Four experts of rank 8 on all linear layers of the built-in base, a batch of rows for each from the demo's four domains,
no padding on either side. One by one: four LoRA steps (forward, backward). Together, as `experts_together: true` does
it: the rows of all in one batch, each through its own expert, at once and in parts of 1,024 tokens. Interleaved, CPU
seconds, medians. Gradients are compared.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from argparse import Namespace
from dataclasses import replace
from statistics import median
from typing import Any

import torch
from torch import Tensor
from train_speed import prepared
from training_step import Point, TrainingStep

from loramix.cli.output import quiet_libraries
from loramix.training.means import DomainMeans

EXPERTS = 4


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rows", type=int, default=4, help="of each expert")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    asked = parser.parse_args()
    quiet_libraries()
    work = prepared(Namespace(max_length=512, rows=asked.rows, batch=0, loop_rows=0))
    parts = [
        [replace(one, domain_id=expert) for one in work.examples[name]]
        for expert, name in enumerate(list(work.examples)[::2])  # one label of each domain
    ]
    everything = [one for part in parts for one in part]
    together = TrainingStep(work.base, Point(method="moa", experts=EXPERTS), everything, tokens_at_once=0)
    together.trainer.mean = DomainMeans(EXPERTS)
    together.model.eval()  # no dropout is used, and routers that nobody teaches are not run
    banks = _banks(together)
    single = [TrainingStep(work.base, Point(method="lora", experts=EXPERTS), part) for part in parts]
    for expert, step in enumerate(single):
        for name, bank in _banks(step).items():
            torch.nn.init.normal_(banks[name].B_EOR.data[expert], std=0.01)
            bank.A_ERI.data[0], bank.B_EOR.data[0] = banks[name].A_ERI.data[expert], banks[name].B_EOR.data[expert]
    times: dict[str, list[float]] = {"one by one": [], "together": [], "together, 1024 tokens at once": []}
    for step in (*single, together):
        _learn(step)
    apart = _apart(single, banks, together)
    for _ in range(asked.rounds + 1):
        for name, found in times.items():
            begun = time.process_time()
            if name == "one by one":
                for step in single:
                    _learn(step)
            else:
                together.trainer.smaller.most = 1024 if "at once" in name else 0
                _learn(together)
            found.append(time.process_time() - begun)
            for step in (*single, together):
                step.optimizer.zero_grad()
    first = times["one by one"][1:]
    report = {
        "tokens": [sum(one.length for one in part) for part in parts],
        "cpu_s": {name: round(median(found[1:]), 3) for name, found in times.items()},
        "one_by_one_over": {
            name: round(median(a / b for a, b in zip(first, found[1:], strict=True)), 3)
            for name, found in times.items()
        },
        "gradients_apart": apart,
    }
    print(json.dumps(report, indent=2))
    return 0


def _banks(step: TrainingStep) -> dict[str, Any]:
    return {n: m.loramix_bank["default"] for n, m in step.model.named_modules() if hasattr(m, "loramix_bank")}


def _learn(step: TrainingStep) -> None:
    step.trainer.auxiliary = {}
    training = step.model.training
    step.trainer.model.train = lambda *_: step.model  # the trainer would put it into training mode
    step.learn(step.batch())
    step.model.training = training


def _apart(single: list[TrainingStep], banks: dict[str, Any], together: TrainingStep) -> float:
    """Returns the largest difference of an expert's gradients, relative to the tensor's largest."""
    worst = 0.0
    for expert, step in enumerate(single):
        for name, bank in _banks(step).items():
            for of in ("A_ERI", "B_EOR"):
                alone: Tensor = getattr(bank, of).grad[0]
                both: Tensor = getattr(banks[name], of).grad[expert]
                worst = max(worst, float((alone - both).abs().max() / alone.abs().max().clamp(min=1e-12)))
    return worst


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    torch.set_num_threads(1)
    raise SystemExit(main())
