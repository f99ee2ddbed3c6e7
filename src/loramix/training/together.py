"""Stage 1 for all experts at once: the rows of all domains in one batch, each through its own expert.

Each expert takes the steps it would take alone, with the same rows in the same order: its loss is a mean over its own
tokens, and clipping, learning rate and end are its own (`own_steps`). What differs are sums in their last bits, and
what dropout drops. The base is passed once for the rows of all experts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from torch import nn
from torch.utils.data import SequentialSampler
from transformers import set_seed

from loramix.data.collation import Example
from loramix.data.joint_steps import JointCollator, JointSteps, steps_alone
from loramix.training.arguments import training_arguments
from loramix.training.keeper import StageKeeper
from loramix.training.means import DomainMeans
from loramix.training.own_steps import OwnSteps
from loramix.training.settings import TrainingSettings
from loramix.training.stages import layout, run
from loramix.training.trainer import MixtureTrainer


def train_in_one_batch(
    model: nn.Module,
    examples: Mapping[str, Sequence[Example]],
    steps: Sequence[int],
    *,
    title: str,
    settings: TrainingSettings,
    pad_token_id: int,
    output_dir: Path,
    log_file: Path,
    console: Console,
    keeper: StageKeeper | None = None,
) -> list[dict[str, Any]]:
    """Trains the experts of a model, each on its own domain, and returns what each has seen.

    Args:
        model: a PeftModel routed by sequence, with an expert for each domain; nothing else of it requires gradients.
        examples: by domain, in the order of the experts.
        steps: how many each expert takes.
        title: for the bar and the log.
        settings: of the stage, as each expert alone would have them.
        pad_token_id, output_dir, log_file, console, keeper: as of `train_stage`.

    Returns:
        for each expert its steps and tokens (real ones); the seconds, shared out by tokens; no loss: the log has it by
            domain, and their mean as `loss`.

    Raises:
        as `train_stage`.
    """
    set_seed(settings.seed)
    rows, accumulated = settings.per_device_train_batch_size, settings.gradient_accumulation_steps
    alone = [
        steps_alone(part, rows, accumulated, settings.seed, taken)
        for part, taken in zip(examples.values(), steps, strict=True)
    ]
    together = JointSteps(alone)
    one_batch = replace(
        settings,
        per_device_train_batch_size=1,  # an item is a whole step
        gradient_accumulation_steps=1,
        num_train_epochs=1.0,
        max_steps=len(together),
        max_grad_norm=0.0,  # each expert's is clipped by itself
    )
    collator, changed = layout(model, settings, pad_token_id)
    trainer = MixtureTrainer(
        model,
        settings=one_batch,
        domains=list(examples),
        sampler=SequentialSampler(together),
        mean=DomainMeans(len(examples)),
        args=training_arguments(one_batch, str(output_dir)),
        train_dataset=together,
        data_collator=JointCollator(collator),
        keeper=keeper,
        say=lambda line: console.print(f"{title}: {line}", highlight=False, soft_wrap=True),
    )
    own = OwnSteps(trainer, settings, list(examples), steps)
    trainer.optimizer, trainer.lr_scheduler = own.optimizer, own.schedule
    seen = run(trainer, changed, title=title, log_file=log_file, console=console)
    tokens = [sum(example.length for step in part for example in step) for part in alone]
    return [
        {
            "steps": taken,
            "tokens": own_tokens,
            "seconds": round(seen["seconds"] * own_tokens / sum(tokens), 1),
            "loss": None,
        }
        for taken, own_tokens in zip(steps, tokens, strict=True)
    ]
