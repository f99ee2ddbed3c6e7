"""Settings of training, in TrainingArguments' words."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from loramix.errors import did_you_mean
from loramix.losses import AUXILIARY

SCHEDULERS = ("cosine", "linear", "constant", "constant_with_warmup", "inverse_sqrt")


@dataclass(frozen=True, kw_only=True)
class TrainingSettings:
    """How one stage trains. Names and meaning are those of `transformers.TrainingArguments`.

    `router_learning_rate` and `losses` (weights of auxiliary losses by name, over the method's own) are ours. The
    router is a fresh small network beside experts that start near their end, so it has a learning rate of its own.

    `padding_free` puts the rows of a micro-batch one after the other into one long row, each with its own positions,
    attention and routing, where the base keeps them apart (it is tried once); false pads them. Sums differ in their
    last bits, dropout in what it drops.

    `tokens_at_once`: a longer micro-batch is learned in parts of at most so many tokens, which takes less memory and,
    on a processor, less time; 0 for no bound, -1 for 1,024 on a processor and no bound on an accelerator or with
    several processes. Losses on a batch's statistics are those of the parts.

    `read_ahead` reads the prompts once before a stage of several epochs, where routers read the base alone; false reads
    them in each step.

    `shared_inputs` works modules out together that read the same input (q, k, v; gate, up): one product for all their
    experts' A, one gradient of that input, one dropout mask. Sums differ in their last bits, dropout in what it drops.
    Not under `torch_compile`.

    `lean_norms` computes frozen RMSNorms in fewer passes, sums then differ in their last bits; `lean_activations`
    keeps less of blocks of silu(gate) * up for the backward, with the same numbers. Both where the base has such (it is
    tried), and neither under `torch_compile`.

    `head_chunk` rows of the language-model head are worked out at a time, where it is an ordinary linear; 0 asks the
    model for all logits. Sums then differ in their last bits.

    `bf16` computes products in bfloat16 (autocast), where experts and routers keep their weights in fp32. Whether the
    base's own weights are bfloat16 is the run's `dtype`.

    `torch_compile` compiles the whole model. The methods routed by token compile as one graph; MoA's guide breaks it.

    `save_steps = 0` keeps no checkpoints but the one that an interrupt leaves.

    The weight of `routing_cross_entropy` is MoA's eta. Under Adam the size of a gradient does not matter, so eta does
    not change how fast the routers learn. Where routers read the running model it weighs how much the routing loss
    bends the experts below them; where they read the base, it has no effect.
    """

    num_train_epochs: float = 3.0
    max_steps: int = -1
    per_device_train_batch_size: int = 4
    gradient_accumulation_steps: int = 1
    learning_rate: float = 3e-4
    router_learning_rate: float = 3e-3
    losses: Mapping[str, float] = field(default_factory=dict)
    lr_scheduler_type: str = "cosine"
    warmup_steps: float = 0.0
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    padding_free: bool = True
    tokens_at_once: int = -1
    read_ahead: bool = True
    shared_inputs: bool = True
    lean_norms: bool = True
    lean_activations: bool = True
    bf16: bool = False
    torch_compile: bool = False
    torch_compile_backend: str = "inductor"
    head_chunk: int = 256
    activation_checkpointing: bool = False
    activation_checkpointing_kwargs: Mapping[str, Any] = field(default_factory=dict)
    dataloader_num_workers: int = 0
    logging_steps: int = 10
    save_steps: int = 100
    save_total_limit: int = 2
    seed: int = 0

    def learned(self) -> dict[str, Any]:
        """Returns the settings that what is learned depends on, or its log: all but those of checkpoints and the
        head's chunks."""
        return {name: value for name, value in asdict(self).items() if not name.startswith(("save_", "head_"))}

    def problems(self) -> list[str]:
        """Returns what is wrong with the values."""
        found = []
        for name in ("learning_rate", "router_learning_rate", "num_train_epochs"):
            if not 0 < getattr(self, name) < float("inf"):
                found.append(f"{name} = {getattr(self, name)}: expected more than 0.")
        at_least_1 = ("per_device_train_batch_size", "gradient_accumulation_steps", "logging_steps", "save_total_limit")
        for name in at_least_1:
            if getattr(self, name) < 1:
                found.append(f"{name} = {getattr(self, name)}: expected at least 1.")
        for name in ("weight_decay", "max_grad_norm", "warmup_steps", "head_chunk"):
            if not 0 <= getattr(self, name) < float("inf"):
                found.append(f"{name} = {getattr(self, name)}: expected 0 or more.")
        found += self._loss_problems()
        if self.activation_checkpointing_kwargs.get("use_reentrant"):
            found.append(
                "activation_checkpointing_kwargs.use_reentrant = true: it cuts the routers out of the graph (their "
                "gradient is lost without a word). Leave it out."
            )
        for name in ("seed", "dataloader_num_workers", "save_steps"):
            if getattr(self, name) < 0:
                found.append(f"{name} = {getattr(self, name)}: expected 0 or more.")
        if self.tokens_at_once < -1:
            found.append(
                f"tokens_at_once = {self.tokens_at_once}: expected 0 or more, or -1 for what suits the device."
            )
        if self.max_steps < 1 and self.max_steps != -1:
            found.append(f"max_steps = {self.max_steps}: expected at least 1, or -1 for as many as the epochs have.")
        if self.lr_scheduler_type not in SCHEDULERS:
            found.append(
                f"lr_scheduler_type = {self.lr_scheduler_type!r}: expected one of {', '.join(SCHEDULERS)}."
                f"{did_you_mean(self.lr_scheduler_type, SCHEDULERS)}"
            )
        return found

    def _loss_problems(self) -> list[str]:
        found = []
        for name, weight in self.losses.items():
            if name not in AUXILIARY:
                known = ", ".join(AUXILIARY)
                found.append(f"losses.{name}: no such loss. Expected one of {known}.{did_you_mean(name, AUXILIARY)}")
            elif not isinstance(weight, int | float) or not 0 <= weight < float("inf"):
                found.append(f"losses.{name} = {weight!r}: expected a weight of 0 or more.")
        return found
