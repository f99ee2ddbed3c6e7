"""Begins a run, or goes on with one that was ended: only with the settings, base and data it was begun with."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import Console

from loramix.errors import ConfigError
from loramix.identity import identity
from loramix.journal import Journal, differences, read_journal
from loramix.preparation import Prepared, prepare, record
from loramix.processes import meet, writes
from loramix.run_folder import RunFolder
from loramix.settings import Experiment
from loramix.training.keeper import Keeping


@dataclass(frozen=True)
class Resume:
    """Whether a run goes on.

    Attributes:
        wanted: go on with what is in the folder, if anything; else it must be new.
        force: also under other settings, another base or other data.
    """

    wanted: bool = False
    force: bool = False


def begin(experiment: Experiment, console: Console, resume: Resume) -> Prepared:
    """Returns the experiment ready to train, with its journal and the keeper of its checkpoints.

    Raises:
        ConfigError: the folder holds a run that is not to go on, or another than this one: each difference is named.
    """
    run = RunFolder(Path(experiment.output_dir))
    going_on = resume.wanted and run.config.is_file()
    done = read_journal(run.progress) if going_on else None
    finished = run.results.is_file()
    meet()  # all have read what there is
    if going_on and done is None:
        if finished:
            raise ConfigError(
                f"{run.path}: a finished run whose progress.json is missing or damaged, so nobody can tell what it was "
                "begun as. Name another output_dir, or remove the run."
            )
        console.print("warning: progress.json is missing or damaged: the run begins anew", highlight=False)
        if writes():
            run.clear()
        going_on = False
    prepared = prepare(experiment, console, new=not going_on)
    now = identity(prepared)
    if done is not None:
        check_same(run, done["identity"], now, force=resume.force, console=console)
        if resume.force:
            record(prepared)
    journal = Journal(run.progress, now, done)
    return replace(prepared, journal=journal, keeping=Keeping(run, journal.run, going_on))


def check_same(
    run: RunFolder, before: dict[str, object], now: dict[str, object], *, force: bool, console: Console
) -> None:
    """Says what differs between two identities of a run, and refuses to go on unless that is forced."""
    found = differences(before, now)
    if not found:
        return
    told = "\n".join(f"  {one}" for one in found[:20] + [f"... and {len(found) - 20} more"] * (len(found) > 20))
    if not force:
        raise ConfigError(
            f"{run.path} cannot go on, it was begun as something else:\n{told}\nRestore these, name another output_dir "
            "or go on all the same by --force: what is done stays as it was done."
        )
    console.print(f"warning: going on although these differ:\n{told}", highlight=False, soft_wrap=True)
