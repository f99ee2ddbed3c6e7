"""What a user sees while training: one bar on a terminal, plain lines elsewhere, and a line of JSON per log entry."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from loramix.processes import writes
from loramix.training.trainer import MixtureTrainer


class TrainingProgress(TrainerCallback):
    """Shows and records one stage.

    Args:
        title: of the stage, for example "experts: finance".
        log_file: JSON lines are appended to it.
        console: where to show; a bar if it is a terminal.
    """

    def __init__(self, title: str, log_file: Path, console: Console) -> None:
        self.title, self.log_file, self.console = title, log_file, console
        self.trainer: MixtureTrainer | None = None
        self.bar: Progress | None = None
        self.task = TaskID(0)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.console.is_terminal:
            self.bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[about]}"),
                TimeRemainingColumn(),
                console=self.console,
                transient=True,
            )
            self.bar.start()
            self.task = self.bar.add_task(self.title, total=state.max_steps, about="")

    def _speed(self) -> float:
        seen = self.trainer.tokens_seen if self.trainer is not None else 0
        return seen / max(self._elapsed(), 1e-9)

    def _elapsed(self) -> float:
        return self.trainer.seconds() if self.trainer is not None else 0.0

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.bar is not None:
            self.bar.update(self.task, completed=state.global_step)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        elapsed = self._elapsed()
        entry = {
            "stage": self.title,
            "step": state.global_step,
            "steps": state.max_steps,
            "elapsed_s": round(elapsed, 2),
            "tokens_per_s": round(self._speed(), 1),
            **(logs or {}),
        }
        if writes():
            with self.log_file.open("a", encoding="utf-8") as out:
                out.write(json.dumps(entry) + "\n")
        if logs is None or "loss" not in logs:
            return
        step = max(state.global_step, 1)
        remaining = elapsed / step * (state.max_steps - step)
        line = f"{self.title}  step {step}/{state.max_steps}  loss {logs['loss']:.3f}"
        accuracies = [value for key, value in logs.items() if key.startswith("router_accuracy/")]
        if accuracies:
            line += f"  routers {sum(accuracies) / len(accuracies):.0%} right"
        line += f"  {self._speed():.0f} tokens/s  {remaining:.0f} s left"
        if self.bar is None:
            self.console.print(line, highlight=False, soft_wrap=True)
        else:
            loss = f"loss {logs['loss']:.3f}  {self._speed():.0f} tokens/s"
            self.bar.update(self.task, about=loss)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.bar is not None:
            self.bar.stop()
            elapsed = self._elapsed()
            self.console.print(
                f"{self.title}: {state.global_step} steps, {self._speed():.0f} tokens/s, {elapsed:.0f} s",
                highlight=False,
            )
