"""Settings of training, in TrainingArguments' words."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class TrainingSettings:
    """How one stage trains. Names and meaning are those of `transformers.TrainingArguments`.

    `router_learning_rate` and `routing_cross_entropy` (eta of MoA, the weight of the routing loss) are ours. The router
    is a fresh small network beside experts that start near their end, so it has a learning rate of its own. Under Adam
    the size of a gradient does not matter, so eta does not change how fast the routers learn: it weighs how much the
    routing loss bends the experts below them.
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
