"""The stages of training: one expert alone, and experts with routers on all domains together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from torch import nn
from transformers import set_seed

from loramix.data.collation import Collator, Example
from loramix.data.mixing import MixtureSampler
from loramix.training.progress import TrainingProgress
from loramix.training.settings import TrainingSettings
from loramix.training.trainer import MixtureTrainer, training_arguments


def train_stage(
    model: nn.Module,
    examples: Mapping[str, Sequence[Example]],
    *,
    domains: Sequence[str],
    title: str,
    settings: TrainingSettings,
    shares: Mapping[str, float],
    pad_token_id: int,
    output_dir: Path,
    log_file: Path,
    console: Console,
    auxiliary: Mapping[str, float] | None = None,
    kinds: Sequence[int] | None = None,
) -> dict[str, Any]:
    """Trains a model on a mixture of domains and returns what was seen.

    Args:
        model: a PeftModel, or a base; what requires gradients is trained in place.
        examples: by domain; those that take part in this stage.
        domains: all domains, in the order of `domain_ids`.
        title: for the bar and the log.
        settings: of the stage.
        shares: of each domain in the mixture, summing to 1.
        pad_token_id: of the base.
        output_dir: of the run.
        log_file: JSON lines are appended to it.
        console: where progress is shown.
        auxiliary: the stage's auxiliary losses with their weights.
        kinds: the kind of each domain, for losses that tell two kinds of data apart.

    Returns:
        steps, tokens (real ones), seconds and the mean training loss.
    """
    set_seed(settings.seed)
    everything = [example for domain in examples.values() for example in domain]
    sampler = MixtureSampler(
        sizes=[len(domain) for domain in examples.values()],
        shares=[shares[name] for name in examples],
        lengths=[example.length for example in everything],
        batch_size=settings.per_device_train_batch_size,
        seed=settings.seed,
    )
    progress = TrainingProgress(title, log_file, console)
    trainer = MixtureTrainer(
        model,
        settings=settings,
        domains=domains,
        sampler=sampler,
        auxiliary=auxiliary,
        kinds=kinds,
        args=training_arguments(settings, str(output_dir)),
        train_dataset=everything,
        data_collator=Collator(pad_token_id),
        callbacks=[progress],
    )
    progress.trainer = trainer
    trainer.pop_callback(_printer())
    done = trainer.train()
    model.eval()
    return {
        "steps": done.global_step,
        "tokens": trainer.tokens_seen,
        "seconds": round(done.metrics["train_runtime"], 1),
        "loss": done.training_loss,
    }


def _printer() -> type:
    """transformers prints each log entry as a dict; our callback shows it instead."""
    from transformers.trainer_callback import PrinterCallback

    return PrinterCallback
