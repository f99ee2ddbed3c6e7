"""`loramix export RUN`: the experts as ordinary PEFT adapters, with routers beside them; `loramix push`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from loramix.cli.output import print_json, quiet_libraries, result_console


def add_to(app: typer.Typer) -> None:
    app.command("export", help="Write a run's experts as ordinary PEFT adapters, or one of them as a whole model.")(
        export
    )
    app.command("push", help="Upload an export to the Hugging Face Hub.")(push)


def export(
    run: Annotated[Path, typer.Argument(help="Folder of a run.")],
    output_dir: Annotated[Path, typer.Option("--output-dir", "-o", help="Folder for the export.")],
    kind: Annotated[
        str, typer.Option("--format", help="peft: an adapter for each expert, and routers. merged: one model.")
    ] = "peft",
    expert: Annotated[str | None, typer.Option(help="With --format merged: the expert to fold into the base.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the manifest as JSON.")] = False,
) -> None:
    quiet_libraries()
    from loramix.errors import ConfigError
    from loramix.lifecycle.editing import mixture_of
    from loramix.lifecycle.export import export_experts
    from loramix.lifecycle.importing import sizes_of
    from loramix.opening import open_run

    if kind not in ("peft", "merged"):
        raise ConfigError(f"--format {kind}: expected peft or merged.")
    if (kind == "merged") != (expert is not None):
        raise ConfigError(
            "--format merged needs --expert NAME, and --expert is for it alone: the routing depends on the input, so "
            "one expert at a time can become a model."
        )
    if expert is not None:
        from loramix.cli.merge import merge

        merge(run, expert=expert, output_dir=output_dir, as_json=as_json)
        return
    folder, experiment = open_run(run)
    linears = list(sizes_of(experiment.model_name_or_path))
    manifest = export_experts(mixture_of(folder, experiment), output_dir, folder, linears)
    if as_json:
        print_json(manifest)
        return
    result_console().print(
        f"{output_dir}: {', '.join(manifest['experts'])}, each an ordinary PEFT LoRA; README.md says how to load them.",
        highlight=False,
        soft_wrap=True,
    )


def push(
    folder: Annotated[Path, typer.Argument(help="An export.")],
    repository: Annotated[str, typer.Argument(help="owner/name on the Hub.")],
    private: Annotated[bool, typer.Option("--private", help="Make a private repository.")] = False,
    revision: Annotated[str | None, typer.Option(help="Branch; main by default.")] = None,
) -> None:
    quiet_libraries()
    from loramix.lifecycle.push import push_export

    url = push_export(folder, repository, private=private, revision=revision)
    result_console().print(url, highlight=False)
