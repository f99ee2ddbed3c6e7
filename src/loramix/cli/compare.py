"""`loramix compare CONFIG [key=value ...]`"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from loramix.cli.output import print_json, progress_console, quiet_libraries, result_console
from loramix.errors import ConfigError, ModelError


def add_to(app: typer.Typer) -> None:
    app.command("compare", help="Train and measure many methods on the same data, and write tables and a report.")(
        compare
    )


def compare(
    config: Annotated[Path, typer.Argument(help="YAML file; see recipes/compare/ and docs/compare.md.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Settings over the file's: data=../shared/data/moa seeds='[0,1]' ...")
    ] = None,
    launcher: Annotated[str, typer.Option(help="local: this machine; ray: a Ray cluster (RAY_ADDRESS).")] = "local",
    jobs: Annotated[int, typer.Option(min=1, help="Cells that run at the same time.")] = 1,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only list the cells, and which are finished.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the results as JSON.")] = False,
) -> None:
    if launcher not in ("local", "ray"):
        raise ConfigError(f"--launcher {launcher}: expected local or ray.")
    quiet_libraries()
    from loramix.comparison import compare as comparing
    from loramix.comparison.settings import load_comparison

    loaded = load_comparison(config, overrides or [])
    console = progress_console()
    for echo in loaded.echoes:
        console.print(echo, highlight=False)
    if dry_run:
        cells, done = comparing.dry_run(loaded.comparison)
        for name, cell in cells.items():  # plain lines: names are long, and may be searched
            print(f"{'finished' if name in done else 'to run':<9} {cell.kind:<7} {name}")
        print(f"{len(cells)} cells, {len(done)} finished")
        return
    done_now = comparing.compare(loaded.comparison, console, launcher=launcher, jobs=jobs)  # type: ignore[arg-type]
    out = Path(loaded.comparison.shared.output_dir)
    _write_report(out)
    if as_json:
        print_json(done_now.results)
    else:
        result_console().print((out / "tables.md").read_text(encoding="utf-8"), markup=False, highlight=False)
        result_console().print(f"Results: {out / comparing.COMPARISON}, tables.md and report.html", highlight=False)
    if done_now.failed:
        lines = [f"  {outcome.cell}: {outcome.problem}" for outcome in done_now.failed]
        raise ModelError("\n".join([f"{len(lines)} cells failed; start again to try them once more:", *lines]))


def _write_report(out: Path) -> None:
    from loramix.cli.report import write

    write([out])
