"""Runs on the tiny base that are ended at some point and go on, and the whole of what two runs left, to compare."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from transformers import Trainer

from loramix.experiment import build
from loramix.methods import METHODS
from loramix.pipeline import run_experiment
from loramix.resuming import Resume
from tests import tiny

CLOCKS = ("seconds", "elapsed_s", "tokens_per_s", "train_runtime", "train_samples_per_second", "train_steps_per_second")


class Killed(BaseException):
    """As if the process had ended here."""


def settings(place: Path, method: str, **more: Any) -> dict[str, Any]:
    """Returns settings of a small run with dropout, accumulation and a log; the data is made if it is not there."""
    if not (place / "base").exists():
        tiny.save_base(place / "base")
    data = {name: str(place / "data" / name) for name in ("adds", "greets", "shouts")}
    if not (place / "data").exists():
        data = tiny.toy_domains(place / "data")
    first = {"max_steps": 5, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "logging_steps": 2}
    adapter = {"lora_dropout": 0.1} if METHODS[method].tuner == "loramix" else {}
    return {
        "method": method,
        "model_name_or_path": str(place / "base"),
        "controls": ["base", "single_long", "mixed"] if method == "moa" else [],
        "data": {"domains": data, "max_length": 64},
        "adapter": adapter,
        "training": {**first, "save_steps": 2, **more},
    }


def train(content: dict[str, Any], folder: Path, *, resume: bool = False, force: bool = False) -> dict[str, Any]:
    """Runs it and returns the results; what was shown is beside the folder."""
    with folder.with_suffix(".screen").open("a") as screen:
        experiment = build({**content, "output_dir": str(folder)}).experiment
        return run_experiment(experiment, Console(file=screen, width=500), resume=Resume(resume, force))


@contextmanager
def calls(owner: Any, name: str, before: Callable[[int], None]) -> Iterator[list[int]]:
    """Calls something before each call of a function, with the number of the call."""
    true, count = getattr(owner, name), [0]

    def watched(*args: Any, **kwargs: Any) -> Any:
        count[0] += 1
        before(count[0])
        return true(*args, **kwargs)

    setattr(owner, name, watched)
    try:
        yield count
    finally:
        setattr(owner, name, true)


def killed_at(number: int) -> Callable[[int], None]:
    """Returns what ends everything at a call."""

    def end(call: int) -> None:
        if call == number:
            raise Killed

    return end


def left_by(folder: Path) -> dict[str, Any]:
    """Returns all that a run left, clocks and places left out: sums of files, results and the log."""
    found: dict[str, Any] = {}
    for file in sorted(folder.rglob("*")):
        name = str(file.relative_to(folder))
        if file.suffix in (".safetensors", ".jsonl") and file.name != "log.jsonl":
            found[name] = hashlib.sha256(file.read_bytes()).hexdigest()
        elif file.is_file():
            found[name] = "there"
    found["results.json"] = _timeless(json.loads((folder / "results.json").read_text()))
    lines = (folder / "log.jsonl").read_text().splitlines() if (folder / "log.jsonl").exists() else []
    found["log.jsonl"] = [_timeless(json.loads(line)) for line in lines]
    return found


def _timeless(content: Any) -> Any:
    if isinstance(content, dict):
        return {key: _timeless(value) for key, value in content.items() if key not in CLOCKS}
    return [_timeless(one) for one in content] if isinstance(content, list) else content


STEP = (Trainer, "training_step")
