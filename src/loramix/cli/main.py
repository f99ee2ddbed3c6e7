"""The command `loramix`. Imports nothing heavy: `loramix --help` answers in well under half a second."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import typer

from loramix import __version__
from loramix.cli import (
    calibrate,
    chat,
    compare,
    demo,
    env,
    evaluate,
    experts,
    export,
    methods,
    report,
    route,
    serve,
    train,
    validate,
)
from loramix.cli.output import EXIT_INTERRUPTED, EXIT_OUT_OF_MEMORY, EXIT_USAGE, fail
from loramix.errors import Interrupted, LoramixError, StorageError

app = typer.Typer(
    name="loramix",
    help="Train, measure and use mixtures of LoRA experts: one frozen model, many domains.",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for verb in (
    demo,
    train,
    compare,
    report,
    evaluate,
    route,
    chat,
    serve,
    calibrate,
    experts,
    export,
    methods,
    validate,
    env,
):
    verb.add_to(app)


def _show_version(wanted: bool) -> None:
    if wanted:
        print(f"loramix {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: bool = typer.Option(False, "--version", callback=_show_version, is_eager=True, help="Show the version."),
) -> None:
    """Train, measure and use mixtures of LoRA experts: one frozen model, many domains."""


def run(arguments: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code.

    0 ok, 2 usage or settings, 3 data, 4 model or adapter, 5 out of memory, 6 diverged, 7 disk, 130 and 143 ended by
    SIGINT and SIGTERM. Any other exception is a mistake of ours and keeps its traceback.
    """
    try:
        code = app(args=None if arguments is None else list(arguments), standalone_mode=False)
        return code if isinstance(code, int) else 0
    except LoramixError as error:
        return fail(str(error), error.exit_code)
    except Interrupted as ended:
        return fail(str(ended), ended.exit_code)
    except (KeyboardInterrupt, typer.Abort):
        return fail("interrupted.", EXIT_INTERRUPTED)
    except MemoryError:
        return fail(_NO_MEMORY, EXIT_OUT_OF_MEMORY)
    except OSError as error:
        if error.filename is None:
            raise
        return fail(f"{error.filename}: {error.strerror}.", StorageError.exit_code)
    except RuntimeError as error:
        if type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in str(error):
            return fail(_NO_MEMORY, EXIT_OUT_OF_MEMORY)
        raise
    except Exception as error:
        # A usage error of the parser. Typer has no public name for it, and carries its own copy of click since 0.20.
        if not hasattr(error, "format_message"):
            raise
        error.show()  # type: ignore[attr-defined]
        return EXIT_USAGE


_NO_MEMORY = (
    "out of memory. Lower per_device_train_batch_size (and raise gradient_accumulation_steps by as much: the result is "
    "the same), lower max_length, or set activation_checkpointing=true."
)


def main() -> None:
    sys.exit(run())
