"""An experiment from its settings to its results: read, train the stages and the controls, measure, write.

Order: stage 1 where the method has it (each expert alone; also the single-LoRA baseline), the control that trains each
of them on, the mixed control, then the method. Each trained model is measured as soon as it exists, so a run is one
pass over one base.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from loramix import processes
from loramix.adapter_settings import adapter_config
from loramix.adapters.adapter import read_adapter
from loramix.budget import all_stages, expert_settings, longer
from loramix.building import save, teach_routers, train_method, train_on, train_together, with_lora
from loramix.errors import ConfigError, DataError, did_you_mean
from loramix.evaluation.evaluate import Row, rows_of, score_domains
from loramix.evaluation.scoring import Score
from loramix.going_on import check_scaling, earlier_rows, experts_for, keep_calibration
from loramix.identity import identity
from loramix.journal import digest, sums_of
from loramix.methods import method_named
from loramix.opening import ADAPTER, check_trained, load_adapter, load_trained
from loramix.preparation import Prepared, prepare, record
from loramix.prompt_store import prompts_of, write_prompts
from loramix.results import Results, answers, measure
from loramix.resuming import Resume, begin
from loramix.run_folder import RunFolder, disk_told, write_json
from loramix.settings import Experiment
from loramix.training.keeper import Keeping
from loramix.training.settings import TrainingSettings
from loramix.tuner.assembly import Expert, take_expert


def run_experiment(
    experiment: Experiment, console: Console, stage: str | None = None, resume: Resume | None = None
) -> dict[str, Any]:
    """Trains and measures everything the experiment asks for and returns the content of results.json.

    Args:
        experiment: the settings.
        console: where progress is shown.
        stage: one stage alone, see `stages_of`; a later one than "experts" goes on from the experts in the run's
            folder.
        resume: whether a run that was ended goes on. What it gives is bitwise what it would have given.

    Raises:
        ConfigError: the method has no such stage; the folder holds another run, or somebody else writes there; several
            processes are to train the experts together.
        ModelError: an expert to go on from is missing or damaged.
        Diverged, Interrupted, StorageError: see `train_stage`.
    """
    started = time.monotonic()
    _check_stage(experiment.method, stage)
    if experiment.experts_together and processes.count() > 1:
        raise ConfigError(
            f"experts_together: got {processes.count()} processes, expected one. Leave it out; each expert is then "
            "trained by all of them."
        )
    resume = resume or Resume()
    run = RunFolder(Path(experiment.output_dir))
    with run.locked(), disk_told(run.path):
        if stage not in (None, "experts"):
            return _go_on(experiment, console, str(stage), started, resume)
        prepared = begin(experiment, console, resume)
        assert prepared.journal is not None
        if prepared.journal.finished and prepared.run.results.is_file():
            console.print("the run is finished.", highlight=False)
            content: dict[str, Any] = json.loads(prepared.run.results.read_text(encoding="utf-8"))
            return content
        results = Results()
        _train_and_measure(prepared, results, stage)
        content = _finished(prepared, results, started)
        if stage is None:
            prepared.journal.note_finished()
    return content


def _train_and_measure(prepared: Prepared, results: Results, stage: str | None) -> None:
    experiment = prepared.experiment
    if "base" in experiment.controls:
        prepared.console.print("measuring the base ...", highlight=False)
        scores = partial(score_domains, prepared.base, prepared.held, pad_token_id=prepared.pad)
        _measure_once(prepared, results, "base", scores)
    method = method_named(experiment.method)
    if method.expert_count == "one":
        _train_one(prepared, results, prepared.run.model, expert_settings(prepared.experiment))
        return
    experts = _train_experts(prepared, results) if method.starts_from_experts else {}
    if stage is None:
        if "mixed" in experiment.controls:
            _train_one(prepared, results, prepared.run.mixed, all_stages(prepared.experiment, prepared.data))
        _train_method(prepared, results, experts)


def stages_of(method: str) -> list[str]:
    """Returns what can be trained by itself: the method's stages where it has several; and routers alone, with the
    experts as they are, where a label teaches them."""
    known = method_named(method)
    names = [stage.name for stage in known.stages] if known.starts_from_experts else []
    return [*names, "routers"] if "routing_cross_entropy" in known.losses else names


def _check_stage(method: str, stage: str | None) -> None:
    if stage is not None and stage not in (known := stages_of(method)):
        raise ConfigError(
            f"--stage {stage}: method {method} has {'the stages ' + ', '.join(known) if known else 'one stage'}. "
            f"{'Name one of them.' if known else 'Leave --stage out.'}{did_you_mean(stage, known)}"
        )


def _go_on(experiment: Experiment, console: Console, stage: str, started: float, resume: Resume) -> dict[str, Any]:
    """A later stage, from the experts that lie in the run's folder: left by stage 1, or imported."""
    run = RunFolder.opened(experiment.output_dir)
    prepared = prepare(experiment, console, new=False)
    experts = experts_for(prepared, stage)
    begun_as = {**identity(prepared), "stage": stage, "experts": {d: sums_of(run.expert(d)) for d in prepared.domains}}
    prepared = replace(prepared, keeping=Keeping(run, digest(begun_as), resume.wanted))
    check_scaling(experts, adapter_config(experiment, prepared.domains))
    before = read_adapter(run.model) if (run.model / "adapter_config.json").is_file() else None
    results = Results()
    rows, results.stages = earlier_rows(run, prepared.data.counts)
    results.rows = [Row(**row) for row in rows]
    measured = {(row.model, row.domain) for row in results.rows}
    for domain in prepared.domains:
        if "base" in experiment.controls and ("base", domain) not in measured:
            results.rows += rows_of("base", _own_domain(prepared, prepared.base, domain))
        if ("single", domain) not in measured:
            model = load_adapter(prepared.base, run.expert(domain))
            results.rows += rows_of("single", _own_domain(prepared, model, domain))
            prepared.base = model.unload()
    _train_method(prepared, results, {name: expert.modules for name, expert in experts.items()}, stage)
    if not keep_calibration(run, before):
        console.print("the calibration no longer holds: run `loramix calibrate` again.", highlight=False)
    return _finished(prepared, results, started)


def _finished(prepared: Prepared, results: Results, started: float) -> dict[str, Any]:
    results.seconds = time.monotonic() - started
    content = results.as_dict(prepared.domains, prepared.experiment.method)
    write_json(prepared.run.results, content)
    if prepared.keeping is not None:
        prepared.keeping.clear()
    return content


def _train_experts(prepared: Prepared, results: Results) -> dict[str, Expert]:
    """Stage 1: each expert alone, measured on its own domain; and the same trained on, if asked for."""
    experts: dict[str, Expert] = {}
    run = prepared.run
    if prepared.experiment.experts_together and len(prepared.domains) > 1:
        _train_together(prepared)
    for domain in prepared.domains:
        part = Part(_expert_title(domain), run.expert(domain), [domain], expert_settings(prepared.experiment))
        model = _train_once(prepared, results, part, partial(with_lora, prepared, domain))
        experts[domain] = take_expert(model.get_base_model(), ADAPTER)
        _measure_once(prepared, results, "single", partial(_own_domain, prepared, model, domain), domain)
        prepared.base = model.unload()
        if "single_long" in prepared.experiment.controls:
            settings = longer(prepared.experiment, prepared.data, domain)
            part = Part(f"longer {domain}", run.longer(domain), [domain], settings)
            trained_on = partial(load_adapter, prepared.base, run.expert(domain), is_trainable=True)
            model = _train_once(prepared, results, part, trained_on)
            _measure_once(prepared, results, "single_long", partial(_own_domain, prepared, model, domain), domain)
            prepared.base = model.unload()
    return experts


def _expert_title(domain: str) -> str:
    return f"expert {domain}"


def _train_together(prepared: Prepared) -> None:
    """Trains all experts in one batch, unless that is done; what reads them next finds each trained."""
    journal, folders = prepared.journal, {domain: prepared.run.expert(domain) for domain in prepared.domains}
    assert journal is not None
    if all(journal.trained(_expert_title(domain), folder) is not None for domain, folder in folders.items()):
        return
    seen = train_together(prepared, folders, "experts together")
    for domain, folder in folders.items():
        journal.note_trained(_expert_title(domain), folder, seen[domain], prepared.run.log)


@dataclass(frozen=True)
class Part:
    """One training of one adapter: its title, where it is saved, what it learns and how."""

    title: str
    folder: Path
    domains: Sequence[str]
    settings: TrainingSettings


def _train_once(prepared: Prepared, results: Results, part: Part, untrained: Callable[[], Any]) -> Any:
    """Returns the model of a part: as it was saved if it is done, else trained now."""
    journal = prepared.journal
    done = None if journal is None else journal.trained(part.title, part.folder)
    if done is None:
        model = untrained()
        done = train_on(prepared, model, part.title, part.domains, part.settings)
        save(model, part.folder)
        if journal is not None:
            journal.note_trained(part.title, part.folder, done, prepared.run.log)
    else:
        model = load_adapter(prepared.base, part.folder)
    results.stages[part.title] = done
    return model


def _measure_once(
    prepared: Prepared, results: Results, name: str, scores: Callable[[], dict[str, list[Score]]], of: str = ""
) -> None:
    """Adds the rows of a model: as they were measured if that is done, else measured now."""
    title, journal = f"{name} {of}".strip(), prepared.journal
    rows = None if journal is None else journal.measured(title)
    if rows is None:
        rows = [asdict(row) for row in rows_of(name, scores())]
        if journal is not None:
            journal.note_measured(title, rows)
    results.rows += [Row(**row) for row in rows]


def _own_domain(prepared: Prepared, model: Any, domain: str) -> dict[str, list[Score]]:
    return score_domains(model, {domain: prepared.held[domain]}, pad_token_id=prepared.pad)


def _train_one(prepared: Prepared, results: Results, folder: Path, settings: TrainingSettings) -> None:
    """One LoRA on all domains."""
    part = Part("mixed", folder, prepared.domains, settings)
    model = _train_once(prepared, results, part, partial(with_lora, prepared, "mixed"))
    scores = partial(score_domains, model, prepared.held, pad_token_id=prepared.pad)
    _measure_once(prepared, results, "mixed", scores)
    prepared.base = model.unload()


def _train_method(prepared: Prepared, results: Results, experts: dict[str, Expert], stage: str | None = None) -> None:
    """The method's last stage, or its routers alone; measured, for a routed one under every decision; one answer for
    each domain."""
    name = prepared.experiment.method
    stage = stage or method_named(name).stages[-1].name
    done = None if prepared.journal is None else prepared.journal.trained(stage, prepared.run.model)
    if done is None:
        train = teach_routers if stage == "routers" else train_method
        model, done = train(prepared, experts)
        record(prepared)  # settings under which a stage failed are not the run's
        save(model, prepared.run.model)
        if prepared.journal is not None:
            prepared.journal.note_trained(stage, prepared.run.model, done, prepared.run.log)
    else:
        model = load_trained(prepared.base, prepared.run, method_named(name))
    results.stages[stage] = done
    if method_named(name).settled_by == "prompt":
        most = prepared.experiment.data.stored_prompts
        write_prompts(prepared.run.prompts, {d: prompts_of(part, most) for d, part in prepared.train.items()})
    prepared.console.print(f"measuring {name} ...", highlight=False)
    measure(prepared, model, results)
    write_json(prepared.run.results, results.as_dict(prepared.domains, name))
    results.examples = answers(prepared, model)


def measure_run(experiment: Experiment, run: RunFolder, console: Console) -> dict[str, Any]:
    """Measures a finished run's model again and returns what results.json would hold of it. Writes nothing.

    Raises:
        ModelError: the adapter is missing or damaged.
    """
    method = method_named(experiment.method)
    check_trained(run, method)
    started = time.monotonic()
    prepared = prepare(experiment, console, new=False)
    model = load_trained(prepared.base, run, method)
    known = prepared.domains
    if method.router is not None:
        config = model.peft_config[ADAPTER]
        known = config.domains or (config.experts if method.expert_count == "one per domain" else known)
    if prepared.domains != known:
        raise DataError(
            f"{run.path}: the data now has the domains {', '.join(prepared.domains)}, the model's experts are "
            f"{', '.join(known)}. Expected the same, in the same order; restore the data of the run."
        )
    results = Results()
    measure(prepared, model, results)
    if method.expert_count != "one":
        results.examples = answers(prepared, model)
    results.seconds = time.monotonic() - started
    return results.as_dict(prepared.domains, experiment.method)
