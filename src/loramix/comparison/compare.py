"""A comparison from its settings to its results: plan, run what is missing, sum up."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from rich.console import Console

from loramix.comparison.judging import judged
from loramix.comparison.launch import Launcher, Outcome, run_cells, workers_for
from loramix.comparison.lines import Line
from loramix.comparison.plan import Cell, Plan, plan
from loramix.comparison.progress import CellProgress
from loramix.comparison.runner import CellRunner
from loramix.comparison.settings import Comparison
from loramix.comparison.summary import overlap_of, reference_of, summarise
from loramix.data.classify import TF_IDF, sentence_encoder
from loramix.errors import ConfigError
from loramix.methods import method_named
from loramix.models import load_skeleton
from loramix.preparation import report_overlap
from loramix.reports.reading import COMPARISON
from loramix.run_folder import write_json
from loramix.tuner import check_fit


@dataclass(frozen=True)
class Compared:
    """What `compare` did: the results, and which cells failed and why."""

    results: dict[str, Any]
    failed: list[Outcome]


def compare(comparison: Comparison, console: Console, *, launcher: Launcher = "local", jobs: int = 1) -> Compared:
    """Runs every cell that is not finished and returns the results of all that are.

    Stopped at any point and started again, it goes on with the cell it was in; finished cells are not run again.

    Args:
        comparison: the settings.
        console: where progress is shown.
        launcher: "local" for this machine, "ray" for a Ray cluster.
        jobs: cells that run at the same time.

    Raises:
        ConfigError, DataError, ModelError: before anything is trained: what is wrong with settings, data or base.
    """
    out = Path(comparison.shared.output_dir)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"output_dir = {str(out)!r} cannot be made ({error.strerror}).") from error
    try:
        with FileLock(out / ".lock", timeout=0):
            return _compare(comparison, console, launcher, jobs, out)
    except Timeout as error:
        raise ConfigError(f"output_dir = {str(out)!r}: another comparison is running there. Wait for it.") from error


def _compare(comparison: Comparison, console: Console, launcher: Launcher, jobs: int, out: Path) -> Compared:
    runner = CellRunner(comparison.cells, comparison.shared.measure)
    if comparison.shared.measure.classifier not in (None, TF_IDF):
        sentence_encoder(str(comparison.shared.measure.classifier))
    planned = plan(comparison, runner.encoded)
    _check_fits(planned)
    report_overlap(overlap_of(planned, runner), console)
    files = {name: runner.measured_file(cell) for name, cell in planned.cells.items()}
    done = [name for name, file in files.items() if file.is_file()]
    failed = _run(planned, done, runner, console, launcher, jobs)

    def judge(lines: Sequence[Line]) -> dict[str, Any] | None:
        reference = reference_of(comparison, lines)
        against = None if reference is None else reference.id
        return judged(comparison.shared.measure.judge, lines, against, out / "judge.jsonl", console)

    results = summarise(comparison, planned, files, runner, judge)
    write_json(out / COMPARISON, results)
    return Compared(results, failed)


def _check_fits(planned: Plan) -> None:
    """Raises a ModelError before any training if an adapter does not fit its base."""
    from loramix.adapter_settings import adapter_config

    seen = set()
    for cell in planned.cells.values():
        experiment = cell.experiment
        if cell.kind == "base" or method_named(experiment.method).tuner != "loramix":
            continue
        key = (experiment.model_name_or_path, experiment.method, str(experiment.adapter))
        if key not in seen:
            seen.add(key)
            skeleton = load_skeleton(experiment.model_name_or_path)
            check_fit(skeleton, adapter_config(experiment, list(cell.needs) or list(cell.domains)))


def _run(
    planned: Plan, done: list[str], runner: CellRunner, console: Console, launcher: Launcher, jobs: int
) -> list[Outcome]:
    left = {name: cell for name, cell in planned.cells.items() if name not in done}
    if not left:
        console.print(f"all {len(done)} cells are finished", highlight=False)
        return []
    failed = []
    started = time.monotonic()
    workers = workers_for(launcher, min(jobs, len(left)), runner)
    with CellProgress(planned.cells, done, console, started) as progress:
        for outcome in run_cells(planned.cells, done, workers):
            progress.show(outcome)
            if outcome.problem is not None:
                failed.append(outcome)
    return failed


def dry_run(comparison: Comparison) -> tuple[Mapping[str, Cell], list[str]]:
    """Returns the cells a comparison would run and the names of those that are finished; trains nothing."""
    runner = CellRunner(comparison.cells, comparison.shared.measure)
    planned = plan(comparison, runner.encoded)
    _check_fits(planned)
    return planned.cells, [n for n, cell in planned.cells.items() if runner.measured_file(cell).is_file()]
