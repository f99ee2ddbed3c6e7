"""The stages of training: one expert alone, and experts with routers on all domains together."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from torch import nn
from transformers import set_seed
from transformers.trainer_utils import TrainOutput

from loramix import processes
from loramix.checkpoints.store import Checkpoint
from loramix.data.collation import Collator, Example
from loramix.data.mixing import MixtureSampler
from loramix.data.padding_free import PaddingFreeCollator
from loramix.models.segment_attention import keeps_segments_apart
from loramix.training.arguments import training_arguments
from loramix.training.keeper import PutBackSums, StageKeeper
from loramix.training.progress import TrainingProgress
from loramix.training.reading_ahead import read_ahead
from loramix.training.settings import TrainingSettings
from loramix.training.stopping import StopAtStepEnd
from loramix.training.trainer import MixtureTrainer
from loramix.training.while_learning import while_learning


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
    keeper: StageKeeper | None = None,
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
        keeper: keeps checkpoints and finds the one to go on from.

    Returns:
        steps, tokens (real ones), seconds and the mean training loss; `went_back` and `parts`, where the guard went
        back to a checkpoint or memory ran out.

    Raises:
        Diverged: steps made no sense and going back did not help.
        Interrupted: SIGINT or SIGTERM came; the step was finished and saved.
        StorageError: a checkpoint cannot be written.
        MemoryError: not even single rows fit.
    """
    set_seed(settings.seed)
    everything = numbered(example for domain in examples.values() for example in domain)
    sampler = MixtureSampler(
        sizes=[len(domain) for domain in examples.values()],
        shares=[shares[name] for name in examples],
        lengths=[example.length for example in everything],
        batch_size=settings.per_device_train_batch_size,
        seed=settings.seed,
    )
    collator, changed = layout(model, settings, pad_token_id)
    states = read_ahead(model, everything, settings, processes.count(), pad_token_id)
    trainer = MixtureTrainer(
        model,
        settings=settings,
        domains=domains,
        sampler=sampler,
        auxiliary=auxiliary,
        kinds=kinds,
        args=training_arguments(settings, str(output_dir)),
        train_dataset=everything,
        data_collator=collator,
        keeper=keeper,
        prompt_states=states,
        say=lambda line: console.print(f"{title}: {line}", highlight=False, soft_wrap=True),
    )
    return run(trainer, changed, title=title, log_file=log_file, console=console)


def run(
    trainer: MixtureTrainer, changed: AbstractContextManager[None], *, title: str, log_file: Path, console: Console
) -> dict[str, Any]:
    """Lets a trainer train, from its newest checkpoint on where there is one, and returns what was seen.

    Args:
        trainer: ready to train.
        changed: what of the model is computed otherwise meanwhile, from `layout`.
        title, log_file, console: as of `train_stage`, which also says what is returned and raised.
    """
    keeper, model = trainer.keeper, trainer.model
    found = _begin(keeper, title, console)
    progress = TrainingProgress(title, log_file, console)
    stop = StopAtStepEnd()
    progress.trainer = trainer
    trainer.pop_callback(_printer())
    trainer.add_callback(progress)
    trainer.add_callback(stop)
    if found is not None:
        trainer.add_callback(PutBackSums(trainer, found.folder))
    with stop, changed:
        done = trainer.train(resume_from_checkpoint=str(found.folder) if found is not None else None)
    stop.raise_if_stopped(title, done.global_step, trainer.state.max_steps, saved=keeper is not None)
    trainer.end_well()
    model.eval()
    return _seen(trainer, done)


def _seen(trainer: MixtureTrainer, done: TrainOutput) -> dict[str, Any]:
    """Returns what a stage saw."""
    seen = {
        "steps": done.global_step,
        "tokens": trainer.tokens_seen,
        "seconds": round(trainer.seconds(), 1),
        "loss": done.training_loss,
    }
    unusual = {"went_back": trainer.guard.went_back, "parts": trainer.smaller.parts}
    return seen | {name: value for name, value in unusual.items() if value > (name == "parts")}


def numbered(examples: Iterable[Example]) -> list[Example]:
    """Returns examples that know their places."""
    return [replace(example, place=place) for place, example in enumerate(examples)]


def layout(
    model: nn.Module, settings: TrainingSettings, pad_token_id: int
) -> tuple[Collator | PaddingFreeCollator, AbstractContextManager[None]]:
    """Returns what puts rows into a batch, and what of the model is computed otherwise while such batches are learned.

    Args:
        model: to be trained.
        settings: of the stage.
        pad_token_id: of the base.
    """
    apart = settings.padding_free and keeps_segments_apart(model)
    collator = PaddingFreeCollator() if apart else Collator(pad_token_id)
    return collator, while_learning(model, settings, apart)


def _begin(keeper: StageKeeper | None, title: str, console: Console) -> Checkpoint | None:
    """Returns the checkpoint to go on from, if there is one, and says which were damaged."""
    found, wrong = keeper.begin() if keeper is not None else (None, [])
    for line in wrong:
        console.print(f"warning: {line}; not used", highlight=False, soft_wrap=True)
    if found is not None:
        console.print(f"{title}: going on after step {found.step}", highlight=False)
    return found


def _printer() -> type:
    """transformers prints each log entry as a dict; our callback shows it instead."""
    from transformers.trainer_callback import PrinterCallback

    return PrinterCallback
