"""Trains and measures one cell after another, and keeps base and encoded data in between."""

from __future__ import annotations

import io
import json
import math
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from filelock import FileLock
from rich.console import Console

from loramix.budget import expert_settings
from loramix.building import save, train_method, train_on, with_lora
from loramix.comparison.measuring import extracts, measure_cell, measure_extracted
from loramix.comparison.plan import Cell, digest
from loramix.comparison.settings import MeasureSettings
from loramix.corpus import Encoded, encode_all
from loramix.environment import environment
from loramix.errors import ModelError
from loramix.methods import method_named
from loramix.models import load_base, load_tokenizer
from loramix.opening import ADAPTER, load_adapter, load_trained
from loramix.preparation import Prepared
from loramix.run_folder import RunFolder, write_json
from loramix.settings import Experiment
from loramix.training.keeper import Keeping
from loramix.training.peak_memory import PeakMemory
from loramix.tuner.assembly import Expert, take_expert

TRAINED = "trained.json"
FAILURE = "failure.txt"


@dataclass
class CellRunner:
    """One worker of a comparison.

    Attributes:
        cells: the folder of all cells.
        measure: what is measured.
    """

    cells: Path
    measure: MeasureSettings
    _encoded: dict[str, Encoded] = field(default_factory=dict, repr=False)
    _tokenizers: dict[str, Any] = field(default_factory=dict, repr=False)
    _base: tuple[str, Any] | None = field(default=None, repr=False)

    def __getstate__(self) -> dict[str, Any]:
        """A copy for another process starts empty: it loads its own base."""
        return {**self.__dict__, "_encoded": {}, "_tokenizers": {}, "_base": None}

    def forget(self) -> None:
        """Lets go of the base."""
        self._base = None

    def encoded(self, experiment: Experiment) -> Encoded:
        """Returns the encoded data of an experiment; made once for all cells that share it."""
        base = experiment.model_name_or_path
        key = digest([base, experiment.data.seed, experiment.data.model_dump()])
        if key not in self._encoded:
            self._encoded[key] = encode_all(experiment, self.tokenizer(base))
        return self._encoded[key]

    def tokenizer(self, base: str) -> Any:
        """Returns the tokenizer of a base; loaded once."""
        if base not in self._tokenizers:
            self._tokenizers[base] = load_tokenizer(base)
        return self._tokenizers[base]

    def measured_file(self, cell: Cell) -> Path:
        """Returns where the cell's measurements lie, once they are made: named for all they depend on."""
        asked = self.measure.model_dump(exclude={"resamples", "classifier", "judge", "batch_size"})
        held = {domain: cell.held[domain] for domain in cell.domains}
        unseen = {domain: found for domain, found in cell.held.items() if domain not in held}
        return self.cells / cell.name / f"measured-{digest([asked, held, unseen])[:10]}.json"

    def run(self, cell: Cell) -> None:
        """Trains the cell unless it is trained, and measures it unless it is measured.

        Raises:
            ModelError: the training diverged, or an expert it starts from is missing.
        """
        file = self.measured_file(cell)
        file.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(file.parent / ".lock"):  # another comparison may share this folder of cells
            if not file.is_file():
                self._run(cell, file)

    def _run(self, cell: Cell, file: Path) -> None:
        prepared = self._prepared(cell)
        model = self._trained(prepared, cell)
        content = measure_cell(prepared, model, cell, self.measure)
        if extracts(cell):
            content["routings"]["extracted"] = measure_extracted(prepared, model, cell, self.measure)
            model, tuner = prepared.base, "base"
        else:
            tuner = method_named(cell.experiment.method).tuner if cell.kind != "base" else "base"
        _check_finite(content, cell)
        write_json(file, content)
        (file.parent / FAILURE).unlink(missing_ok=True)
        self._keep_base(prepared, model, tuner)

    def record_failure(self, cell: Cell, text: str) -> None:
        """Writes what went wrong into the cell's folder; the base may be half adapted, so it is loaded anew."""
        self._base = None
        folder = self.cells / cell.name
        folder.mkdir(parents=True, exist_ok=True)
        (folder / FAILURE).write_text(text, encoding="utf-8")

    def _prepared(self, cell: Cell) -> Prepared:
        experiment, name = cell.experiment, cell.experiment.model_name_or_path
        key = f"{name} {experiment.base_form()}"
        if self._base is None or self._base[0] != key:
            self._base = None
            self._base = key, load_base(name, **experiment.base_form())
        run = RunFolder(self.cells / cell.name)
        run.path.mkdir(parents=True, exist_ok=True)
        silent = Console(file=io.StringIO(), force_terminal=False)
        data = self.encoded(experiment)
        keeping = Keeping(run, cell.name, resume=True)
        prepared = Prepared(experiment, run, self._base[1], self.tokenizer(name), data, silent, keeping)
        self._base = None  # taken over by the cell's model; given back when the cell is done
        return prepared

    def _keep_base(self, prepared: Prepared, model: Any, tuner: str) -> None:
        settings = prepared.experiment.settings({**prepared.experiment.expert_stage, **prepared.experiment.joint_stage})
        if tuner == "none" or settings.activation_checkpointing:
            return  # the base itself was trained, or keeps its checkpointing hooks
        base = model if tuner == "base" else model.unload() if tuner == "loramix" else model.get_base_model()
        experiment = prepared.experiment
        self._base = f"{experiment.model_name_or_path} {experiment.base_form()}", base

    def _trained(self, prepared: Prepared, cell: Cell) -> Any:
        """Returns the cell's model: trained now, or as its folder holds it."""
        if cell.kind == "base":
            return prepared.base
        method = method_named(cell.experiment.method)
        told = prepared.run.path / TRAINED
        if told.is_file():
            return load_trained(prepared.base, prepared.run, method)
        shutil.rmtree(prepared.run.model, ignore_errors=True)
        if not prepared.run.checkpoints.is_dir():
            prepared.run.log.unlink(missing_ok=True)
        peak = PeakMemory()
        model, stage = self._train(prepared, cell)
        if stage["loss"] is not None and not math.isfinite(stage["loss"]):
            raise ModelError(f"{cell.name}: the training diverged (loss {stage['loss']}). Lower learning_rate.")
        save(model, prepared.run.model)
        write_json(
            told,
            {
                "cell": cell.name,
                "stage": stage,
                "parameters": _parameters(model),
                "peak_memory_mb": peak.megabytes(),
                "environment": environment(),
            },
        )
        if prepared.keeping is not None:
            prepared.keeping.clear()
        return model

    def _train(self, prepared: Prepared, cell: Cell) -> tuple[Any, dict[str, Any]]:
        if cell.kind == "method":
            experts = self._experts(prepared, cell.needs)
            return train_method(prepared, experts, cell.domains)
        domain = cell.domains[0]
        if cell.kind == "longer":
            model = load_adapter(prepared.base, self._folder(cell.needs[domain]), is_trainable=True)
        else:
            model = with_lora(prepared, domain)
        return model, train_on(prepared, model, f"{cell.kind} {domain}", [domain], expert_settings(prepared.experiment))

    def _experts(self, prepared: Prepared, needs: Mapping[str, str]) -> dict[str, Expert]:
        experts: dict[str, Expert] = {}
        for domain, cell in needs.items():
            model = load_adapter(prepared.base, self._folder(cell))
            experts[domain] = take_expert(model.get_base_model(), ADAPTER)
            prepared.base = model.unload()
        return experts

    def _folder(self, cell: str) -> Path:
        return RunFolder(self.cells / cell).model


def _parameters(model: Any) -> dict[str, int]:
    """Returns how many parameters were trained, and how many experts and routers hold."""
    named = list(model.named_parameters())
    return {
        "trained": sum(p.numel() for _, p in named if p.requires_grad),
        "experts": sum(p.numel() for name, p in named if ".loramix_bank." in name),
        "routers": sum(p.numel() for name, p in named if ".loramix_router." in name),
    }


def _check_finite(content: Any, cell: Cell) -> None:
    """Raises a ModelError if a number was measured that is none."""
    try:
        json.dumps(content, allow_nan=False)
    except ValueError as error:
        raise ModelError(
            f"{cell.name}: measuring gave a number that is not finite, so the training diverged. Lower learning_rate."
        ) from error
