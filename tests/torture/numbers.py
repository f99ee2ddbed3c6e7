"""NaN and Inf put into loss, gradient, weights and data, and learning rates a thousand times too high: every training
is put right or ended within five steps, and no number that is none is ever on disk.

    python -m tests.torture.numbers [--cases 100]
"""

from __future__ import annotations

import argparse
import json
import math
import random
import shutil
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch

from loramix.cli.output import quiet_libraries
from loramix.errors import Diverged
from loramix.training.guard import StepGuard
from loramix.training.trainer import MixtureTrainer
from tests import ended
from tests.test_guards import finite_on_disk, spoiled

KINDS = ("loss", "gradient", "weights", "data", "rate")
METHODS = ("lora", "mola", "mosld", "moelora-contrastive")
WITHIN = 5


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--cases", type=int, default=100)
    args = parser.parse_args()
    quiet_libraries()
    torch.set_num_threads(1)
    found = {"cases": args.cases, "in_time": 0, "ended": 0, "put_right": 0, "on_disk": 0}
    with tempfile.TemporaryDirectory() as scratch:
        for number in range(args.cases):
            one = case(Path(scratch), number)
            for name, value in one.items():
                found[name] += value
    print(json.dumps(found))
    return int(found["in_time"] != args.cases or found["on_disk"] > 0)


def case(place: Path, number: int) -> dict[str, int]:
    """Returns what became of one training: 1 or 0 for each."""
    draw = random.Random(number)
    kind, method = KINDS[number % len(KINDS)], METHODS[number // len(KINDS) % len(METHODS)]
    value, at = draw.choice([math.nan, math.inf, -math.inf]), draw.randrange(2, 9)
    once = draw.random() < 0.5
    content = ended.settings(place, method, max_steps=14, save_steps=2, lr_scheduler_type="constant")
    if kind == "rate":
        content["training"]["learning_rate"] = 30.0 if method == "lora" else 3.0
        at = 1
    folder, watched = place / "run", Watched()
    diverged = 0
    with pytest.MonkeyPatch.context() as patch:
        if kind == "data":
            patch.setattr(MixtureTrainer, "compute_loss", _poisoned(value, at, once))
        elif kind != "rate":
            patch.setattr(
                MixtureTrainer, "compute_loss", spoiled(kind, value, lambda step: step == at if once else step >= at)
            )
        patch.setattr(MixtureTrainer, "_get_grad_norm", watched.norm())
        try:
            ended.train(content, folder)
        except Diverged:
            diverged = 1
    try:
        finite_on_disk(folder)
        dirty = 0
    except AssertionError as error:
        print(f"case {number} ({kind}, {method}, {value}): {error}")
        dirty = 1
    shutil.rmtree(folder)
    in_time = int(watched.longest <= WITHIN and (diverged or watched.guard.left_out == 0))
    if not in_time:
        print(f"case {number} ({kind}, {method}, {value}, at {at}): {watched}")
    return {"in_time": in_time, "ended": diverged, "put_right": 1 - diverged, "on_disk": dirty}


class Watched:
    """How many steps in a row had weights or gradients that make no sense before something was done about it."""

    def __init__(self) -> None:
        self.longest = self._now = 0
        self.guard = StepGuard(2)

    def norm(self) -> Any:
        true = MixtureTrainer._get_grad_norm

        def judged(trainer: MixtureTrainer, *args: Any, **kwargs: Any) -> Any:
            back = trainer.guard.went_back
            norm = true(trainer, *args, **kwargs)
            self.guard = trainer.guard
            self._now = 0 if norm is not None or trainer.guard.went_back != back else self._now + 1
            self.longest = max(self.longest, self._now)
            return norm

        return judged

    def __repr__(self) -> str:
        return f"{self.longest} bad steps in a row, {self.guard.left_out} at the end"


def _poisoned(value: float, at: int, once: bool) -> Any:
    """Returns a compute_loss in which the base's embedding of one token of the batch is no number."""
    true = MixtureTrainer.compute_loss

    def loss(self: MixtureTrainer, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        step = self.state.global_step + 1
        if not (step == at if once else step >= at):
            return true(self, model, inputs, *args, **kwargs)
        embedding = model.get_input_embeddings().weight
        token = int(inputs["input_ids"][0, -1])
        kept = embedding[token].detach().clone()
        with torch.no_grad():
            embedding[token] = value
        found = true(self, model, inputs, *args, **kwargs)
        with torch.no_grad():
            embedding.data[token] = kept
        return found

    return loss


if __name__ == "__main__":
    raise SystemExit(main())
