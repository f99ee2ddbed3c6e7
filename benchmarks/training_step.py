"""One step of training as `loramix train` takes it, to be profiled and measured: batch, loss, backward, optimizer."""

from __future__ import annotations

import copy
import random
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from tempfile import TemporaryDirectory
from typing import Any

import torch
from peers import shared_copy
from peft import get_peft_model
from step_variants import TARGETS
from torch import nn

from loramix import LoramixConfig
from loramix.data.collation import Collator, Example
from loramix.data.padding_free import PaddingFreeCollator
from loramix.data.prompts import Encoded
from loramix.methods import METHODS
from loramix.training.arguments import training_arguments
from loramix.training.settings import TrainingSettings
from loramix.training.trainer import MixtureTrainer
from loramix.training.while_learning import while_learning


@dataclass(frozen=True, kw_only=True)
class Point:
    """What is trained: a method and its sizes, and the batch. `dropout` is the experts' on their input; `bf16` is the
    training setting (autocast), for a base in bfloat16."""

    method: str
    experts: int = 8
    top_k: int = 2
    rank: int = 8
    targets: str = "all-linear"
    rows: int = 4
    length: int = 256
    padding_free: bool = True
    backend: str = "auto"
    dropout: float = 0.0
    bf16: bool = False


def examples_of(point: Point, words: int) -> list[Example]:
    """Returns rows of random tokens, the second half of each learned, their domains in turn."""
    draw = random.Random(0)
    half = point.length // 2
    return [
        Example(
            Encoded(
                [draw.randrange(3, words) for _ in range(point.length)], [i >= half for i in range(point.length)], half
            ),
            row % point.experts,
        )
        for row in range(point.rows)
    ]


def first_layers(base: Any, layers: int) -> Any:
    """Returns a base that shares its weights but has only the first layers of it; all for 0."""
    if layers == 0:
        return base
    short = copy.copy(base)
    short._modules = dict(base._modules)
    short.config = copy.deepcopy(base.config)
    short.config.num_hidden_layers = layers
    inner = copy.copy(base.model)
    inner._modules = dict(base.model._modules)
    inner.layers = nn.ModuleList(base.model.layers[:layers])
    inner.config = short.config
    short.model = inner
    return short


class TrainingStep:
    """A method on a base, ready to take steps on one batch.

    With `point.bf16` the model's forward runs in autocast and returns fp32, as accelerate prepares it for a Trainer;
    the losses outside of it run in the types they are given. Experts and routers keep fp32 weights (PEFT's default).

    Args:
        base: frozen; its weights are shared.
        point: method and sizes.
        examples: the batch; random ones by default.
        training: settings other than the defaults.
    """

    def __init__(self, base: Any, point: Point, examples: Sequence[Example] | None = None, **training: Any) -> None:
        method = METHODS[point.method]
        names = [f"d{number}" for number in range(point.experts)]
        given: dict[str, Any] = {"experts": ["mixed"] if method.expert_count == "one" else names}
        if method.expert_count == "free":
            given = {"num_experts": point.experts, "allocation": "uniform"}
        if method.router is not None and method.router.level == "token":
            given["router"] = {"top_k": min(point.top_k, point.experts)}
        config = LoramixConfig(
            method=point.method,
            r=point.rank,
            lora_alpha=2 * point.rank,
            lora_dropout=point.dropout,
            **({} if point.method == "lora" else {"backend": point.backend}),
            target_modules=list(TARGETS[point.targets]),
            **given,
        )
        torch.manual_seed(0)
        self.model = get_peft_model(shared_copy(base), config).train()
        self.examples = list(examples or examples_of(point, base.config.vocab_size))
        self.collator = PaddingFreeCollator() if point.padding_free else Collator(0)
        settings = TrainingSettings(max_steps=1, padding_free=point.padding_free, bf16=point.bf16, **training)
        with TemporaryDirectory() as folder:  # the trainer asks for one, and writes nothing there
            self.trainer = MixtureTrainer(
                self.model,
                settings=settings,
                domains=names,
                auxiliary=dict(method.losses),
                args=training_arguments(settings, folder),
                train_dataset=[0],
            )
        if point.bf16:
            # No Trainer.train() prepares the model here, and without that nothing would run in autocast.
            self.trainer.accelerator.prepare_model(self.model)
        self.optimizer = self.trainer.create_optimizer()
        changed = while_learning(
            self.model, settings, apart=point.padding_free
        )  # as long as the step lives, as for a stage
        changed.__enter__()
        weakref.finalize(self, changed.__exit__, None, None, None)

    def batch(self) -> dict[str, Any]:
        """Returns the batch, collated anew."""
        made: dict[str, Any] = self.collator(self.examples)
        return made

    def learn(self, batch: dict[str, Any]) -> None:
        """Forward, losses, backward."""
        batches, _ = self.trainer.get_batch_samples(iter([batch]), 1, torch.device("cpu"))
        self.trainer.training_step(self.model, batches[0])

    def update(self) -> None:
        """The optimizer's part."""
        self.optimizer.step()
        self.optimizer.zero_grad()

    def __call__(self) -> None:
        """One step."""
        self.learn(self.batch())
        self.update()
