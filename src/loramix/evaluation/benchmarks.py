"""Benchmarks of lm-eval on a model of any method, on local data."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from loramix.data.domains import read_unseen
from loramix.data.records import Record
from loramix.errors import ConfigError, DataError, Problems, did_you_mean
from loramix.evaluation.benchmark_tasks import OWN, with_data, write_tasks

FORMAT = "loramix benchmarks 1"
_COUNTED = ("name", "alias", "sample_len", "sample_count")
"""What lm-eval puts among a task's metrics that is none."""
_SEED = 1234
"""Of few-shot examples and of sampled answers, as lm-eval has it."""


def run_benchmarks(
    model: Any,
    tokenizer: Any,
    tasks: Sequence[str],
    *,
    folders: Sequence[Path] = (),
    data: Mapping[str, str] | None = None,
    own: Mapping[str, Sequence[Record]] | None = None,
    expert: str | None = None,
    chat: bool = False,
    limit: int | None = None,
    batch_size: int = 8,
    share_prompts: bool = True,
    about: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Returns what lm-eval measures of a model, as plain values.

    lm-eval's own tasks are looked through (which takes ten seconds) only for names that `folders` do not have; they
    take their data from the Hub. A task's YAML can name Python functions, which are run: use folders you trust.

    Args:
        model: a base or a PeftModel, ready to answer.
        tokenizer: of the base.
        tasks: names of tasks, groups or tags; "own" asks the questions of `own`.
        folders: with tasks of your own, as YAML.
        data: task -> file of multiple-choice rows in any shape loramix reads (docs/data.md), for tasks that ask for
            loramix's fields (recipes/lm_eval).
        own: domain -> held-out records.
        expert: the expert to pin, or the domain for a model that must be told it.
        chat: put each question into the base's chat template, as in training.
        limit: questions of each task at most.
        batch_size: requests answered together at most.
        share_prompts: read a question once for all its options, where that gives the same.
        about: what is kept of the model's origin.

    Returns:
        "format", "lm_eval" (its version), "model", "chat_template", "limit", and "tasks" and "groups": name -> version,
        n_shot, samples (asked), of (how many there are) and metrics: name -> value, stderr (None where lm-eval gives
        none) and better ("higher", "lower" or None). A metric's name has its filter behind a comma, if there is one.

    Raises:
        ConfigError: lm-eval is not installed; unknown tasks; from `asking_of`.
        DataError: a task's data cannot be read, or lacks what the task asks for.
    """
    lm_eval = _library()
    from transformers import set_seed

    from loramix.evaluation.harness_model import HarnessModel

    asked = HarnessModel(
        model, tokenizer, expert=expert, batch_size=batch_size, share_prompts=share_prompts, about=about
    )
    with TemporaryDirectory(prefix="loramix-") as scratch:
        paths = [Path(folder) for folder in folders]
        if OWN in tasks:
            paths.append(Path(scratch) / OWN)
            write_tasks(paths[-1], own or {})
        manager = _manager(tasks, paths)
        specs = _with_local_data(manager, tasks, data or {}, Path(scratch) / "data")
        loaded = manager.load([part for name, spec in specs.items() for part in _loaded(manager, name, spec)])
        for task in loaded["tasks"].values():
            _settle(task)
        set_seed(_SEED)
        results = lm_eval.evaluate(
            asked, loaded, limit=limit, apply_chat_template=chat, fewshot_as_multiturn=True, log_samples=False
        )
    groups = results.get("groups", {})
    return {
        "format": FORMAT,
        "lm_eval": lm_eval.__version__,
        "model": {**asked.about, "expert": expert},
        "chat_template": chat,
        "limit": limit,
        "tasks": {name: _measured(results, name) for name in results["results"] if name not in groups},
        "groups": {name: _measured(results, name, "groups") for name in groups},
    }


def check_installed() -> None:
    """Raises a ConfigError if lm-eval is not installed; for callers who have work to do before they need it."""
    _library()


def _library() -> Any:
    """Returns lm-eval, quiet but for errors.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        import lm_eval
        import lm_eval.tasks
    except ImportError as error:
        raise ConfigError(f'benchmarks need lm-eval ({error}): pip install "loramix[eval]".') from error
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    return lm_eval


def _manager(tasks: Sequence[str], folders: Sequence[Path]) -> Any:
    """Returns lm-eval's index of tasks.

    Raises:
        ConfigError: a folder is missing, or a task unknown.
    """
    from lm_eval.tasks import TaskManager

    problems = Problems("the benchmarks")
    for folder in folders:
        if not folder.is_dir():
            problems.add(f"{folder}: no such folder. Expected one with YAML files of tasks.")
    problems.raise_as(ConfigError)
    manager = TaskManager(include_path=list(folders), include_defaults=False)
    if any(task not in manager.all_tasks for task in tasks):
        manager = TaskManager(include_path=list(folders))
    known = set(manager.all_tasks)
    for task in tasks:
        if task not in known:
            problems.add(f"{task!r}: no such task.{did_you_mean(task, known)} `lm_eval ls tasks` lists lm-eval's own.")
    problems.raise_as(ConfigError)
    return manager


def _with_local_data(manager: Any, tasks: Sequence[str], data: Mapping[str, str], folder: Path) -> dict[str, str]:
    """Returns task -> what to ask lm-eval for: its name, or the YAML of the same task on local questions.

    Raises:
        ConfigError: data for a task that is not asked, or that is no single task.
        DataError: the data cannot be read, or holds something else than questions with options.
    """
    problems = Problems("the benchmarks")
    for task in data:
        if task not in tasks:
            problems.add(f"data for {task!r}, which is not asked. Expected one of {', '.join(tasks)}.")
        elif task not in manager.all_subtasks or not manager.task_index[task].yaml_path:
            problems.add(f"data for {task!r}, which is no single task. Name the tasks in it instead.")
    problems.raise_as(ConfigError)
    records = read_unseen(data)
    return {
        task: str(with_data(folder, task, manager.task_index[task].yaml_path, records[task]))
        if task in records
        else task
        for task in tasks
    }


def _loaded(manager: Any, name: str, spec: str) -> list[Any]:
    """Returns what lm-eval makes of a name: a task, a group, or the tasks of a tag.

    Raises:
        DataError: its data cannot be had, or lacks a field. lm-eval, datasets and Jinja have no error in common, so any
            of theirs is passed on as one message.
    """
    try:
        loaded = manager.load([spec])
    except Exception as error:
        said = " ".join(str(error).split()) or type(error).__name__
        raise DataError(
            f"benchmark {name!r} cannot be loaded: {said[:300]}. Give a task of recipes/lm_eval its questions with "
            f"--data {name}=FILE; lm-eval's own tasks fetch theirs from the Hub."
        ) from error
    group = loaded.get("groups", {}).get(name)
    return [group] if group is not None else list(loaded["tasks"].values())


def _settle(task: Any) -> None:
    """Does for a task what `simple_evaluate` does before it measures. That function itself would also start git and
    pip to describe the machine, which a run's environment.json does already, and print what they complain of."""
    if task.get_config("num_fewshot") is None:
        task.set_config("num_fewshot", 0)
    task.set_fewshot_seed(_SEED)


def _measured(results: Mapping[str, Any], name: str, part: str = "results") -> dict[str, Any]:
    """Returns one task's or group's numbers."""
    found: dict[str, Any] = results[part][name]
    better = results.get("higher_is_better", {}).get(name, {})
    metrics = {}
    for key, value in found.items():
        metric, _, applied = key.partition(",")
        if key in _COUNTED or metric.endswith("_stderr"):
            continue
        stderr = found.get(f"{metric}_stderr,{applied}")
        metrics[metric if applied in ("", "none") else key] = {
            "value": value,
            "stderr": stderr if isinstance(stderr, float) else None,
            "better": {True: "higher", False: "lower"}.get(better.get(metric)),
        }
    counted = results["n-samples"].get(name, {})
    return {
        "version": str(results["versions"].get(name)),
        "n_shot": results["n-shot"].get(name),
        "samples": counted.get("effective", found.get("sample_len")),
        "of": counted.get("original"),
        "metrics": metrics,
    }
