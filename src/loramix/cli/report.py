"""`loramix report RUN...`"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from loramix.cli.output import print_json, result_console
from loramix.errors import ConfigError


def add_to(app: typer.Typer) -> None:
    app.command("report", help="Write one HTML page and Markdown tables from finished runs and comparisons.")(report)


def report(
    runs: Annotated[list[Path], typer.Argument(help="Folders of finished `compare` or `train` runs.")],
    out: Annotated[Path | None, typer.Option(help="The page; by default report.html in the first folder.")] = None,
    markdown: Annotated[Path | None, typer.Option(help="The tables; by default tables.md beside it.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print what was read as JSON; write nothing.")] = False,
) -> None:
    if as_json:
        from loramix.reports.reading import read

        contents = [read(run) for run in runs]
        print_json(contents[0] if len(contents) == 1 else contents)
        return
    for path in write(runs, out, markdown):
        result_console().print(str(path), highlight=False, soft_wrap=True)


def write(runs: Sequence[Path], out: Path | None = None, markdown: Path | None = None) -> tuple[Path, Path]:
    """Writes page and tables of some runs and returns where they are.

    Raises:
        ConfigError: a run cannot be read, or a file cannot be written.
    """
    from loramix.reports.markdown import markdown as as_markdown
    from loramix.reports.page import page
    from loramix.reports.reading import read

    contents = [read(run) for run in runs]
    out = out or Path(runs[0]) / "report.html"
    markdown = markdown or out.with_name("tables.md")
    texts = {out: page(contents), markdown: "\n".join(as_markdown(content) for content in contents)}
    for file, text in texts.items():
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text, encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"{file}: cannot be written ({error.strerror}). Name another file.") from error
    return out, markdown
