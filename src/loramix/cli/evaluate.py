"""`loramix eval RUN`: measures a finished run again."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from loramix.cli.output import print_json, progress_console, quiet_libraries


def add_to(app: typer.Typer) -> None:
    app.command("eval", help="Measure a finished run: perplexity under each routing, router accuracy.")(evaluate)


def evaluate(
    run: Annotated[Path, typer.Argument(help="Folder of a run.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print the results as JSON.")] = False,
    max_examples: Annotated[int | None, typer.Option(help="Held-out examples of each domain at most.")] = None,
) -> None:
    quiet_libraries()
    from loramix.cli.train import show
    from loramix.experiment import load
    from loramix.pipeline import measure_run
    from loramix.run_folder import RunFolder

    folder = RunFolder.opened(run)
    overrides = [f"data.max_test_examples={max_examples}"] if max_examples else []
    results = measure_run(load(folder.config, overrides).experiment, folder, progress_console())
    if as_json:
        print_json(results)
    else:
        show(results)
