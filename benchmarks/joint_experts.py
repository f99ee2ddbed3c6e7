"""Would the experts of stage 1 train faster together, all their rows in one pass of the base, than one after another?

    OMP_NUM_THREADS=1 python benchmarks/joint_experts.py [--rows 4 2 1] [--rounds 5] [--bf16] [--json]

Four experts of rank 8 on all linear layers of the built-in base, a batch of rows for each from the demo's four domains,
no padding on either side; so many rows of each expert, one number after the other in each round. One by one: four LoRA
steps (forward, backward). Together, as `experts_together: true` does it: the rows of all in one batch, each through its
own expert, at once and in parts of 1,024 tokens. Interleaved, CPU seconds, medians. Gradients are compared.

Everything is fp32; with --bf16 the base's weights are bfloat16 and every forward runs in autocast, experts in fp32 (as
`dtype: bfloat16` and `bf16: true` have it), so gradients are apart by bfloat16's rounding.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from datetime import date
from statistics import median
from typing import Any

import torch
from torch import Tensor
from train_sides import prepared
from training_step import Point, TrainingStep

from loramix.cli.output import quiet_libraries
from loramix.data.collation import Example
from loramix.environment import environment
from loramix.training.means import DomainMeans

EXPERTS = 4
WAYS = ("one by one", "together", "together, 1024 tokens at once")


@dataclass
class Batches:
    """So many rows of each expert: the batch of each, how far gradients of the two ways are apart, and the CPU seconds
    of each way by round."""

    rows: int
    parts: list[list[Example]]
    apart: float = 0.0
    seconds: dict[str, list[float]] = field(default_factory=lambda: {way: [] for way in WAYS})


class Steps:
    """Four experts on one base, alone and together, with the same weights; what they learn is given each time.

    Args:
        base: frozen; its weights are shared.
        parts: a batch for each expert, to begin with.
        bf16: the training setting.
    """

    def __init__(self, base: Any, parts: Sequence[list[Example]], bf16: bool) -> None:
        everything = [one for part in parts for one in part]
        point = Point(method="moa", experts=EXPERTS, bf16=bf16)
        self.together = TrainingStep(base, point, everything, tokens_at_once=0)
        self.together.trainer.mean = DomainMeans(EXPERTS)
        self.together.model.eval()  # no dropout is used, and routers that nobody teaches are not run
        self.single = [TrainingStep(base, replace(point, method="lora"), part) for part in parts]
        banks = _banks(self.together)
        for expert, step in enumerate(self.single):
            for name, bank in _banks(step).items():
                torch.nn.init.normal_(banks[name].B_EOR.data[expert], std=0.01)
                bank.A_ERI.data[0], bank.B_EOR.data[0] = banks[name].A_ERI.data[expert], banks[name].B_EOR.data[expert]

    def learn(self, batches: Batches, way: str) -> float:
        """Forward and backward of all experts in one of the ways; returns CPU seconds."""
        self.together.examples = [one for part in batches.parts for one in part]
        for step, part in zip(self.single, batches.parts, strict=True):
            step.examples = part
        self.together.trainer.smaller.most = 1024 if "at once" in way else 0
        begun = time.process_time()
        for step in self.single if way == "one by one" else [self.together]:
            _learn(step)
        return time.process_time() - begun

    def forget(self) -> None:
        """Drops the gradients."""
        for step in (*self.single, self.together):
            step.optimizer.zero_grad()

    def apart(self, batches: Batches) -> float:
        """Returns the largest difference of an expert's gradients, relative to the tensor's largest."""
        self.learn(batches, "one by one")
        self.learn(batches, "together")
        worst, banks = 0.0, _banks(self.together)
        for expert, step in enumerate(self.single):
            for name, bank in _banks(step).items():
                for of in ("A_ERI", "B_EOR"):
                    alone: Tensor = getattr(bank, of).grad[0]
                    both: Tensor = getattr(banks[name], of).grad[expert]
                    worst = max(worst, float((alone - both).abs().max() / alone.abs().max().clamp(min=1e-12)))
        self.forget()
        return worst


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--rows", type=int, nargs="+", default=[4, 2, 1], help="of each expert; each number is measured"
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--bf16", action="store_true", help="base in bfloat16, products in autocast")
    parser.add_argument("--json", action="store_true")
    asked = parser.parse_args()
    quiet_libraries()
    work = prepared(max(asked.rows), bf16=asked.bf16)
    all_parts = [
        [replace(one, domain_id=expert) for one in work.examples[name]]
        for expert, name in enumerate(list(work.examples)[::2])  # one label of each domain
    ]
    measured = [Batches(rows, [part[:rows] for part in all_parts]) for rows in asked.rows]
    steps = Steps(work.base, all_parts, asked.bf16)
    for batches in measured:
        batches.apart = steps.apart(batches)
    for number in range(asked.rounds + 1):  # the first warms up
        for batches in measured:
            for way in WAYS:
                seconds = steps.learn(batches, way)
                steps.forget()
                if number:
                    batches.seconds[way].append(seconds)
    report = {
        "date": date.today().isoformat(),
        "environment": environment(),
        "threads": torch.get_num_threads(),
        "bf16": asked.bf16,
        "rows": [row(batches) for batches in measured],
    }
    print(json.dumps(report, indent=2))
    return 0


def row(batches: Batches) -> dict[str, Any]:
    """Returns the figures of so many rows of each expert: medians over rounds, ratios within them."""
    tokens = [sum(one.length for one in part) for part in batches.parts]
    first = batches.seconds["one by one"]
    return {
        "rows": batches.rows,
        "tokens": tokens,
        "tokens_per_expert_step": round(sum(tokens) / len(tokens), 1),
        "cpu_s": {way: round(median(found), 3) for way, found in batches.seconds.items()},
        "one_by_one_over": {
            way: round(median(a / b for a, b in zip(first, found, strict=True)), 3)
            for way, found in batches.seconds.items()
        },
        "gradients_apart": batches.apart,
    }


def _banks(step: TrainingStep) -> dict[str, Any]:
    return {n: m.loramix_bank["default"] for n, m in step.model.named_modules() if hasattr(m, "loramix_bank")}


def _learn(step: TrainingStep) -> None:
    step.trainer.auxiliary = {}
    training = step.model.training
    step.trainer.model.train = lambda *_: step.model  # the trainer would put it into training mode
    step.learn(step.batch())
    step.model.training = training


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    torch.set_num_threads(1)
    raise SystemExit(main())
