"""`loramix eval RUN`: measures a finished run again; with --benchmark, by lm-eval."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from loramix.cli.output import print_json, print_table, progress_console, quiet_libraries, result_console

if TYPE_CHECKING:
    from loramix.run_folder import RunFolder
    from loramix.settings import Experiment


def add_to(app: typer.Typer) -> None:
    app.command(
        "eval", help="Measure a finished run: perplexity under each routing, router accuracy; or benchmarks of lm-eval."
    )(evaluate)


def evaluate(
    run: Annotated[Path, typer.Argument(help="Folder of a run.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print the results as JSON.")] = False,
    max_examples: Annotated[int | None, typer.Option(help="Held-out examples of each domain at most.")] = None,
    benchmark: Annotated[
        list[str] | None,
        typer.Option(help="Tasks of lm-eval instead, with commas; own asks the run's own multiple-choice questions."),
    ] = None,
    tasks_dir: Annotated[
        list[Path] | None, typer.Option(help="Folder with YAML tasks, recipes/lm_eval for example.")
    ] = None,
    data: Annotated[
        list[str] | None, typer.Option(help="TASK=FILE: multiple-choice questions for a task of recipes/lm_eval.")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Questions of each benchmark at most.")] = None,
    expert: Annotated[
        str | None, typer.Option(help="Pin one expert in benchmarks; for moelora-task, the domain.")
    ] = None,
    chat_template: Annotated[
        bool | None, typer.Option(help="Ask benchmarks through the base's chat template; by default only own.")
    ] = None,
    share_prompts: Annotated[
        bool | None, typer.Option(help="Read a question once for all its options, as benchmarks do by default.")
    ] = None,
) -> None:
    quiet_libraries()
    from loramix.experiment import load
    from loramix.pipeline import measure_run
    from loramix.run_folder import RunFolder

    asks = {"--tasks-dir": tasks_dir, "--data": data, "--limit": limit, "--expert": expert}
    asks |= {"--chat-template": chat_template, "--share-prompts": share_prompts}
    _check_options([name for name, value in asks.items() if value not in (None, [])], benchmark, max_examples)
    folder = RunFolder.opened(run)
    overrides = [f"data.max_test_examples={max_examples}"] if max_examples else []
    tasks = list(dict.fromkeys(name.strip() for part in benchmark or [] for name in part.split(",") if name.strip()))
    experiment = load(folder.config, overrides, with_data=not benchmark or "own" in tasks).experiment
    if benchmark:
        how: dict[str, Any] = {"folders": tasks_dir or [], "data": _by_task(data or []), "limit": limit}
        how |= {"expert": expert, "chat": _through_template(tasks, chat_template)}
        how |= {"share_prompts": share_prompts is not False}
        results = _benchmarks(experiment, folder, tasks, how)
        print_json(results) if as_json else _show(results)
        return
    results = measure_run(experiment, folder, progress_console())
    if as_json:
        print_json(results)
    else:
        from loramix.cli.train import show

        show(results)


def _check_options(asks: list[str], benchmark: list[str] | None, max_examples: int | None) -> None:
    from loramix.errors import ConfigError

    if asks and not benchmark:
        raise ConfigError(f"{', '.join(asks)}: for benchmarks only. Name one with --benchmark, or leave it out.")
    if benchmark and max_examples is not None:
        raise ConfigError("--max-examples: for perplexity only. With --benchmark use --limit.")


def _through_template(tasks: list[str], given: bool | None) -> bool:
    """Returns whether prompts go through the chat template: a run's own questions were learned so, other benchmarks are
    published without it."""
    from loramix.errors import ConfigError

    if given is not None:
        return given
    if "own" in tasks and len(tasks) > 1:
        raise ConfigError(
            "--benchmark: own is asked through the chat template, others by default are not. Ask own by itself, or say "
            "--chat-template or --no-chat-template for all."
        )
    return tasks == ["own"]


def _by_task(given: list[str]) -> dict[str, str]:
    from loramix.errors import ConfigError, Problems

    problems = Problems("--data")
    found = {}
    for one in given:
        task, equals, file = one.partition("=")
        if not equals or not task or not file:
            problems.add(f"{one!r}: expected TASK=FILE, local_arc_easy=arc/test.jsonl for example.")
        found[task] = file
    problems.raise_as(ConfigError)
    return found


def _benchmarks(experiment: Experiment, folder: RunFolder, tasks: list[str], how: dict[str, Any]) -> dict[str, Any]:
    from loramix.corpus import read_all
    from loramix.evaluation.benchmarks import check_installed, run_benchmarks
    from loramix.opening import open_model

    check_installed()
    if "own" in tasks:
        splits, unseen = read_all(experiment)
        how = {**how, "own": {**{domain: split.test for domain, split in splits.items()}, **unseen}}
    model, tokenizer = open_model(experiment, folder)
    about = {"run": str(folder.path), "method": experiment.method, "base": experiment.model_name_or_path}
    return run_benchmarks(model, tokenizer, tasks, about=about, **how)


def _show(results: dict[str, Any]) -> None:
    """Prints a row for each metric of each task, then of each group."""
    rows = []
    for name, one in {**results["tasks"], **results["groups"]}.items():
        counted = str(one["samples"]) if one["samples"] == (one["of"] or one["samples"]) else ""
        counted = counted or f"{one['samples']} of {one['of']}"
        for metric, found in one["metrics"].items():
            value, stderr = found["value"], found["stderr"]
            number = f"{value:.4f}" if isinstance(value, float) else str(value)
            about = f"± {stderr:.4f}" if stderr is not None else ""
            rows.append([name, str(one["version"]), str(one["n_shot"]), counted, metric, number, about])
    model = results["model"]
    title = f"{model['method']}, expert {model['expert']}" if model["expert"] else model["method"]
    title += f": lm-eval {results['lm_eval']}, {'with' if results['chat_template'] else 'without'} chat template"
    print_table(title, ["task", "version", "n-shot", "samples", "metric", "value", "stderr"], rows)
    result_console().print("lm-eval's standard errors; --json has all of it.", highlight=False)
