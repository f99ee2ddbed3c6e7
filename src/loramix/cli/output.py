"""How the command line speaks: results to standard output, the rest to standard error, one exit code per cause."""

from __future__ import annotations

import json
import logging
import os
import sys
import warnings
from typing import Any

from rich.console import Console
from rich.table import Table

from loramix.processes import writes

EXIT_USAGE = 2
EXIT_OUT_OF_MEMORY = 5
EXIT_INTERRUPTED = 130


def progress_console() -> Console:
    """Returns the console for progress and notes: standard error, so that --json output stays clean."""
    return Console(stderr=True, quiet=not writes())


def result_console() -> Console:
    """Returns the console for results: standard output."""
    return Console(quiet=not writes())


def print_json(content: Any) -> None:
    if writes():
        print(json.dumps(content, indent=2, ensure_ascii=False))


def print_table(title: str, heads: list[str], rows: list[list[str]], *, words: bool = False) -> None:
    """Prints a table; the first column is text, the others are numbers, or with `words` text that may be folded."""
    table = Table(title=title, title_justify="left", title_style="bold")
    for number, head in enumerate(heads):
        left = number == 0 or words
        table.add_column(head, justify="left" if left else "right", no_wrap=words and number == 0, overflow="fold")
    for row in rows:
        table.add_row(*row)
    result_console().print(table)


def quiet_libraries() -> None:
    """Keeps the libraries' own bars and deprecation notes off the screen; ours say what is going on."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    warnings.filterwarnings("ignore", category=FutureWarning)
    logging.getLogger("transformers").setLevel(logging.ERROR)
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


def fail(message: str, code: int) -> int:
    """Prints an error and returns the exit code."""
    print(f"error: {message}", file=sys.stderr)
    return code
