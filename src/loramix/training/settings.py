"""Settings of training, in TrainingArguments' words."""

from __future__ import annotations

from dataclasses import dataclass

from loramix.errors import did_you_mean

SCHEDULERS = ("cosine", "linear", "constant", "constant_with_warmup", "inverse_sqrt")


@dataclass(frozen=True, kw_only=True)
class TrainingSettings:
    """How one stage trains. Names and meaning are those of `transformers.TrainingArguments`.

    `router_learning_rate` and `routing_cross_entropy` (eta of MoA, the weight of the routing loss) are ours. The router
    is a fresh small network beside experts that start near their end, so it has a learning rate of its own. Under Adam
    the size of a gradient does not matter, so eta does not change how fast the routers learn. Where routers read the
    running model it weighs how much the routing loss bends the experts below them; where they read the base, it has no
    effect.
    """

    num_train_epochs: float = 3.0
    max_steps: int = -1
    per_device_train_batch_size: int = 4
    gradient_accumulation_steps: int = 1
    learning_rate: float = 3e-4
    router_learning_rate: float = 3e-3
    routing_cross_entropy: float = 0.1
    lr_scheduler_type: str = "cosine"
    warmup_steps: float = 0.0
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    activation_checkpointing: bool = False
    dataloader_num_workers: int = 0
    logging_steps: int = 10
    seed: int = 0

    def problems(self) -> list[str]:
        """Returns what is wrong with the values."""
        found = []
        for name in ("learning_rate", "router_learning_rate", "num_train_epochs"):
            if not 0 < getattr(self, name) < float("inf"):
                found.append(f"{name} = {getattr(self, name)}: expected more than 0.")
        for name in ("per_device_train_batch_size", "gradient_accumulation_steps", "logging_steps"):
            if getattr(self, name) < 1:
                found.append(f"{name} = {getattr(self, name)}: expected at least 1.")
        for name in ("routing_cross_entropy", "weight_decay", "max_grad_norm", "warmup_steps"):
            if not 0 <= getattr(self, name) < float("inf"):
                found.append(f"{name} = {getattr(self, name)}: expected 0 or more.")
        for name in ("seed", "dataloader_num_workers"):
            if getattr(self, name) < 0:
                found.append(f"{name} = {getattr(self, name)}: expected 0 or more.")
        if self.max_steps < 1 and self.max_steps != -1:
            found.append(f"max_steps = {self.max_steps}: expected at least 1, or -1 for as many as the epochs have.")
        if self.lr_scheduler_type not in SCHEDULERS:
            found.append(
                f"lr_scheduler_type = {self.lr_scheduler_type!r}: expected one of {', '.join(SCHEDULERS)}."
                f"{did_you_mean(self.lr_scheduler_type, SCHEDULERS)}"
            )
        return found
