"""Experts that lie in one tensor, each with the optimizer's steps it would take alone: its own clipping, learning rate
and end."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import Trainer, TrainingArguments, get_scheduler

from loramix.training.settings import TrainingSettings


class OwnSteps:
    """An optimizer and a schedule of the slices of stacked experts.

    The optimizer knows each expert's slices as parameters of their own, which share the stacked tensors' memory. Before
    it takes a step they are given their part of the gradients, clipped by the expert's own norm; experts that have
    taken all their steps are given none, and stay as they are.

    Args:
        trainer: whose model has stacked experts (E, ...) as its only trained parameters, on its device.
        settings: of the stage.
        experts: names, by position.
        steps_E: how many each takes.
    """

    def __init__(
        self, trainer: Trainer, settings: TrainingSettings, experts: Sequence[str], steps_E: Sequence[int]
    ) -> None:
        self._steps_E, self._most = list(steps_E), settings.max_grad_norm
        model: Any = trainer.model
        stacks = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self._stacks = list(stacks.values())
        self._slices = [[nn.Parameter(stack.data[e]) for stack in self._stacks] for e in range(len(experts))]
        groups = [
            {"params": [(f"{name}[{expert}]", part) for name, part in zip(stacks, slices, strict=True)]}
            for expert, slices in zip(experts, self._slices, strict=True)
        ]
        kind, options = Trainer.get_optimizer_cls_and_kwargs(trainer.args, model)
        options |= {"lr": settings.learning_rate, "weight_decay": settings.weight_decay}
        self.optimizer: torch.optim.Optimizer = kind(groups, **options)
        self.optimizer.register_step_pre_hook(lambda *_: self._hand_over())
        self.optimizer.register_step_post_hook(lambda *_: self._let_go())
        self.schedule = LambdaLR(self.optimizer, [_schedule(trainer.args, steps) for steps in self._steps_E])

    def _hand_over(self) -> None:
        done = self.schedule.last_epoch
        for expert, slices in enumerate(self._slices):
            if done >= self._steps_E[expert]:
                continue
            for part, stack in zip(slices, self._stacks, strict=True):
                part.grad = None if stack.grad is None else stack.grad[expert]
            if self._most > 0:
                nn.utils.clip_grad_norm_(slices, self._most)

    def _let_go(self) -> None:
        for slices in self._slices:
            for part in slices:
                part.grad = None


def _schedule(args: TrainingArguments, steps: int) -> Any:
    """Returns the factor of the learning rate by step, as a training of so many steps would have it."""
    alone = torch.optim.SGD([Tensor([0.0])], lr=1.0)
    warmup = args.get_warmup_steps(steps)
    made: Any = get_scheduler(args.lr_scheduler_type, alone, num_warmup_steps=warmup, num_training_steps=steps)
    return made.lr_lambdas[0]
