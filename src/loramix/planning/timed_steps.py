"""Takes the steps of a stage with the trainer that trains, and times them."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import SequentialSampler
from transformers import PrinterCallback, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from loramix.data.collation import Example
from loramix.planning.work import Work
from loramix.training.arguments import training_arguments
from loramix.training.reading_ahead import read_ahead
from loramix.training.stages import layout
from loramix.training.trainer import MixtureTrainer

FEWEST, MOST = 2, 5
"""Rounds: the first warms up and does not count."""
SECONDS = 0.7
"""By the clock, after which no round begins that need not be."""


@dataclass(frozen=True)
class Times:
    """The best of a few repetitions, in seconds.

    Attributes:
        learning: each kind of batch: collating, forward, losses, backward.
        update: what is done once a step: clipping, and the optimizer's part.
        trained: numbers that it changes.
    """

    learning: list[float]
    update: float
    trained: int

    def best(self, other: Times) -> Times:
        """Returns the better of each of two."""
        learning = [min(pair) for pair in zip(self.learning, other.learning, strict=True)]
        return Times(learning, min(self.update, other.update), self.trained)


def timed_steps(work: Work, model: Any, batches: Sequence[Sequence[Example]]) -> Times:
    """Returns how long steps on batches take, which are learned in turn.

    Args:
        work: of the stage; but a step is one batch, learned at once. Prompts are read before it only if the routers
            allow it.
        model: a PeftModel in training mode, of no use afterwards.
        batches: rows of each, as many in one as in another.
    """
    rows = [replace(row, place=place) for place, row in enumerate(row for batch in batches for row in batch)]
    # More epochs than one, so that reading ahead pays where it is asked for.
    stage = replace(
        work.settings,
        max_steps=MOST * len(batches),
        per_device_train_batch_size=len(batches[0]),
        gradient_accumulation_steps=1,
        lr_scheduler_type="constant",
        warmup_steps=0,
        tokens_at_once=0,
        torch_compile=False,
        dataloader_num_workers=0,
        logging_steps=10**6,
        save_steps=0,
        read_ahead=work.ahead,
    )
    pad = model.config.get_text_config().pad_token_id
    pad = pad if isinstance(pad, int) else 0
    collator, forms = layout(model, stage, pad)
    domains = [str(number) for number in range(1 + max(row.domain_id for row in rows))]
    clock = _Clock(len(batches))
    with TemporaryDirectory() as folder:  # transformers asks for one, and writes nothing there
        trainer = MixtureTrainer(
            model,
            settings=stage,
            domains=domains,
            sampler=SequentialSampler(range(len(rows) * MOST)),
            auxiliary=work.losses,
            kinds=[number * 2 // len(domains) for number in range(len(domains))],
            args=training_arguments(stage, folder),
            train_dataset=rows * MOST,
            data_collator=collator,
            prompt_states=read_ahead(model, rows, stage, 1, pad),
            say=lambda line: None,
        )
        trainer.pop_callback(PrinterCallback)
        trainer.add_callback(clock)
        learn: Callable[..., Tensor] = trainer.training_step

        def learn_by_the_clock(*args: Any) -> Tensor:
            loss = learn(*args)
            clock.learned()
            return loss

        # No callback comes between gradients and their clipping.
        trainer.training_step = learn_by_the_clock  # type: ignore[method-assign, assignment]
        with forms:
            trainer.train()
    return Times(
        learning=[min(times[1:]) for times in clock.learning],
        update=min(clock.updates[1:]),
        trained=sum(one.numel() for one in model.parameters() if one.requires_grad),
    )


def _now() -> float:
    """Seconds by the accelerator's clock when it has done all; on a processor those that it gave to the thread that
    leads, which takes part in all that others do: what a quiet machine's clock would show."""
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
        return time.perf_counter()
    return time.thread_time()


@dataclass
class _Clock(TrainerCallback):  # type: ignore[misc]
    """Notes how long steps take, whose batches are of so many kinds in turn, and ends when there are enough."""

    kinds: int
    now: Callable[[], float] = _now
    learning: list[list[float]] = field(default_factory=list)
    updates: list[float] = field(default_factory=list)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.learning = [[] for _ in range(self.kinds)]
        self.begun, self.last = time.monotonic(), self.now()

    def learned(self) -> None:
        """To be called when a batch's gradients are there."""
        learned = self.now()
        self.learning[len(self.updates) % self.kinds].append(learned - self.last)
        self.last = learned

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        updated = self.now()
        self.updates.append(updated - self.last)
        self.last = updated
        rounds, more = divmod(len(self.updates), self.kinds)
        if rounds >= FEWEST and not more and time.monotonic() - self.begun > SECONDS:
            control.should_training_stop = True
