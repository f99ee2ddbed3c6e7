"""What a checkpoint of a stage holds, taken from a trainer and put back: going on is as if nothing had happened."""

from __future__ import annotations

import json
import os
import re
import shutil
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from loramix.checkpoints.optimizer_state import optimizer_state, set_optimizer_state
from loramix.checkpoints.random_state import random_state, set_random_state
from loramix.checkpoints.store import Checkpoint, CheckpointStore
from loramix.errors import ModelError
from loramix.processes import meet, writes
from loramix.run_folder import RunFolder
from loramix.training.settings import TrainingSettings

if TYPE_CHECKING:
    from loramix.training.trainer import MixtureTrainer

WEIGHTS = "weights.safetensors"
OPTIMIZER = "optimizer.safetensors"
PARAMETERS = "optimizer.json"
PROCESSES = "processes.json"
TRAINER = "trainer_state.json"
"""transformers' name: its training loop reads the step from it."""


@dataclass(frozen=True)
class Keeping:
    """Keeps checkpoints of all stages of a run.

    Attributes:
        run: its folder.
        belongs_to: what a checkpoint must say it belongs to: a name for settings, base and data.
        resume: go on from checkpoints that are there.
    """

    run: RunFolder
    belongs_to: str
    resume: bool

    def stage(self, title: str, settings: TrainingSettings, log_bytes: int = 0) -> StageKeeper:
        """Returns who keeps one stage's.

        Args:
            title: of the stage.
            settings: how many to keep.
            log_bytes: how long the log was when the stage began.
        """
        slug = f"{re.sub(r'[^a-z0-9]+', '-', title.lower()).strip('-')[:40]}-{zlib.crc32(title.encode()):08x}"
        store = CheckpointStore(self.run.checkpoints / slug, keep=settings.save_total_limit)
        about = {"run": self.belongs_to, "stage": title}
        return StageKeeper(store, about, self.resume, self.run.log, log_bytes)

    def clear(self) -> None:
        """Removes all checkpoints: the stages they belong to are done."""
        if writes():
            shutil.rmtree(self.run.checkpoints, ignore_errors=True)


@dataclass(frozen=True)
class StageKeeper:
    """Keeps checkpoints of one stage.

    Attributes:
        store: where.
        about: what a checkpoint must say of itself to belong to this stage: which stage of which run, JSON.
        resume: go on from the newest that is whole; without one, or without this, those that are there are removed.
        log_file: of the run; what was written behind a checkpoint is taken out again.
        log_bytes: how long it was when the stage began.
    """

    store: CheckpointStore
    about: Mapping[str, Any]
    resume: bool
    log_file: Path
    log_bytes: int = 0

    def begin(self) -> tuple[Checkpoint | None, list[str]]:
        """Returns where to go on from, if anywhere, and what is wrong with newer checkpoints, a line each."""
        if not writes():
            meet()
            return self.store.newest(self._misfit)[0] if self.resume else None, []
        found, wrong = self.store.newest(self._misfit) if self.resume else (None, [])
        if found is None:
            self.store.clear()
        keep = self.log_bytes if found is None else found.about["log_bytes"]
        if self.resume and self.log_file.is_file() and self.log_file.stat().st_size > keep:
            os.truncate(self.log_file, keep)
        self.store.begin()
        meet()
        return found, wrong

    def save(self, trainer: MixtureTrainer) -> None:
        """Writes a checkpoint of a trainer that stands between two steps, unless a weight is not finite. There is none
        behind the last step: transformers' loop, put there, would take one more; and the model is saved next.

        Raises:
            StorageError: it cannot be written.
        """
        if trainer.state.global_step >= trainer.state.max_steps:
            return
        trainer.store_flos()
        processes = gathered(trainer, json.dumps(_process_state(trainer), allow_nan=False))
        weights = trained_weights(trainer.model)
        if not all(bool(torch.isfinite(weight).all()) for weight in weights.values()):
            return
        if trainer.accelerator.is_main_process:
            log_bytes = self.log_file.stat().st_size if self.log_file.is_file() else 0

            def fill(folder: Path) -> None:
                tensors, rest = optimizer_state(_optimizer(trainer), _names(trainer))
                save_file({name: weight.detach().contiguous() for name, weight in weights.items()}, folder / WEIGHTS)
                save_file(tensors, folder / OPTIMIZER)
                rest["scheduler"] = {"last_epoch": trainer.lr_scheduler.last_epoch}
                (folder / PARAMETERS).write_text(json.dumps(rest, allow_nan=False), encoding="utf-8")
                (folder / PROCESSES).write_text(json.dumps(processes), encoding="utf-8")
                trainer.state.save_to_json(str(folder / TRAINER))

            self.store.write(trainer.state.global_step, {**self.about, "log_bytes": log_bytes}, fill)
        trainer.accelerator.wait_for_everyone()

    def go_back(self, trainer: MixtureTrainer) -> Checkpoint | None:
        """Puts weights and optimizer of the newest whole checkpoint back; data and schedule go on. Returns it, or None
        where there is none."""
        found, _ = self.store.newest(self._misfit)
        if found is not None:
            load_weights(trainer.model, found.folder)
            load_optimizer(trainer, found.folder, schedule=False)
        return found

    def _misfit(self, about: Mapping[str, Any]) -> str | None:
        wrong = [key for key, value in self.about.items() if about.get(key) != value]
        return f"it belongs to something else (another {', '.join(wrong)})" if wrong else None


def trained_weights(model: nn.Module) -> dict[str, nn.Parameter]:
    """Returns what is trained of a model, by name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def load_weights(model: nn.Module, folder: Path) -> None:
    """Puts the weights of a checkpoint into a model.

    Raises:
        ModelError: they are not those this model trains.
    """
    saved, trained = load_file(folder / WEIGHTS), trained_weights(model)
    wrong = sorted(set(saved) ^ set(trained))
    wrong += [name for name in set(saved) & set(trained) if saved[name].shape != trained[name].shape]
    if wrong:
        raise ModelError(
            f"{folder}: holds other weights than this model trains ({len(wrong)} differ, such as {wrong[0]}). Remove "
            "the folder of checkpoints to begin the stage anew."
        )
    with torch.no_grad():
        for name, weight in trained.items():
            weight.copy_(saved[name])


def load_optimizer(trainer: MixtureTrainer, folder: Path, *, schedule: bool = True) -> None:
    """Puts the optimizer's state of a checkpoint back, and the schedule's place. Learning rates are the settings' own,
    so that they may differ where that was forced.

    Raises:
        ModelError: it is of other parameters.
    """
    rest = json.loads((folder / PARAMETERS).read_text(encoding="utf-8"))
    optimizer, tensors = _optimizer(trainer), load_file(folder / OPTIMIZER)
    wrong = set_optimizer_state(optimizer, _names(trainer), tensors, rest)
    if wrong:
        raise ModelError(f"{folder}: {'; '.join(wrong)}. Remove the folder of checkpoints to begin the stage anew.")
    if schedule:
        place = trainer.lr_scheduler
        place.last_epoch = rest["scheduler"]["last_epoch"]
        place._step_count = place.last_epoch + 1
        rates = [base * of(place.last_epoch) for base, of in zip(place.base_lrs, place.lr_lambdas, strict=True)]
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        place._last_lr = rates


def process_state(trainer: MixtureTrainer, folder: Path) -> dict[str, Any]:
    """Returns what a checkpoint holds of this process."""
    states = json.loads((folder / PROCESSES).read_text(encoding="utf-8"))
    found = json.loads(states[trainer.accelerator.process_index])
    assert isinstance(found, dict)
    return found


class PutBackSums(TrainerCallback):
    """Puts back what a process had summed up, once the loop has set its own sums to zero.

    Args:
        trainer: whose.
        folder: of the checkpoint.
    """

    def __init__(self, trainer: MixtureTrainer, folder: Path) -> None:
        self._trainer, self._folder = trainer, folder

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        trainer, device = self._trainer, args.device
        saved = process_state(trainer, self._folder)
        trainer._tr_loss = torch.tensor(saved["tr_loss"], device=device)
        trainer._total_loss_scalar = saved["total_loss"]
        trainer._globalstep_last_logged = saved["last_logged"]
        trainer._initial_global_step = 0
        trainer._tokens_seen = torch.tensor(saved["tokens_seen"], dtype=torch.float64, device=device)
        trainer.tally.set_state(saved["tally"], device)
        trainer.guard.set_state(saved["guard"])
        trainer.smaller.parts = saved["parts"]
        trainer.seconds_before = saved["seconds"]


def restore_random(state: Mapping[str, Any]) -> None:
    """Puts the generators of random numbers back."""
    set_random_state(state["random"])


def gathered(trainer: MixtureTrainer, text: str) -> list[str]:
    """Returns a text of every process, in their order, in every process."""
    if trainer.accelerator.num_processes == 1:
        return [text]
    device = trainer.accelerator.device
    raw = torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8).to(device)
    lengths: Tensor = trainer.accelerator.gather(torch.tensor([len(raw)], device=device))
    padded = torch.zeros(1, int(lengths.max()), dtype=torch.uint8, device=device)
    padded[0, : len(raw)] = raw
    rows: Tensor = trainer.accelerator.gather(padded)
    return [
        bytes(row[: int(length)].cpu().numpy()).decode()
        for row, length in zip(rows, lengths.flatten(), strict=True)
    ]  # fmt: skip


def _process_state(trainer: MixtureTrainer) -> dict[str, Any]:
    return {
        "random": random_state(),
        "tr_loss": float(trainer._tr_loss),
        "total_loss": trainer._total_loss_scalar,
        "last_logged": trainer._globalstep_last_logged,
        "tokens_seen": float(trainer._tokens_seen),
        "tally": trainer.tally.state(),
        "guard": trainer.guard.state(),
        "parts": trainer.smaller.parts,
        "seconds": trainer.seconds(),
    }


def _optimizer(trainer: MixtureTrainer) -> torch.optim.Optimizer:
    wrapped: Any = trainer.optimizer
    found: torch.optim.Optimizer = getattr(wrapped, "optimizer", wrapped)
    return found


def _names(trainer: MixtureTrainer) -> dict[Tensor, str]:
    """Returns the names of what the optimizer knows: the model's parameters, or parts of them that it names itself."""
    names: dict[Tensor, str] = {parameter: name for name, parameter in trainer.model.named_parameters()}
    for group in _optimizer(trainer).param_groups:
        names |= dict(zip(group["params"], group.get("param_names", ()), strict=False))
    return names
