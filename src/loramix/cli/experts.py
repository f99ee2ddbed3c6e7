"""`loramix experts ...`: what happens to experts before and after training."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from loramix.cli import discover, merge
from loramix.cli.output import print_json, print_table, progress_console, quiet_libraries, result_console

Run = Annotated[Path, typer.Argument(help="Folder of a run.")]
Name = Annotated[str, typer.Argument(help="The expert.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def add_to(app: typer.Typer) -> None:
    group = typer.Typer(
        no_args_is_help=True, help="Import, discover, list, add, remove, rename, extract and merge experts."
    )
    group.command("import", help="Make a mixture from LoRA adapters that exist already.")(import_)
    group.command("list", help="Show the experts of a run.")(list_)
    group.command("show", help="Show one expert of a run.")(show)
    group.command("add", help="Train one more expert and let it join a run.")(add)
    group.command("remove", help="Take an expert out of a run.")(remove)
    group.command("rename", help="Give an expert another name.")(rename)
    group.command("extract", help="Write one expert as an ordinary PEFT LoRA.")(extract)
    merge.add_to(group)
    discover.add_to(group)
    app.add_typer(group, name="experts")


def import_(
    sources: Annotated[
        list[str],
        typer.Argument(help="NAME=FOLDER or NAME=owner/name for each adapter; or the one folder of an export."),
    ],
    output_dir: Annotated[str, typer.Option("--output-dir", "-o", help="Folder of the run to make.")],
    method: Annotated[str, typer.Option(help="moa, arrow, lorahub, mole or moe-lora.")] = "moa",
    base: Annotated[str | None, typer.Option(help="The base they were trained on; by default what they say.")] = None,
    any_base_name: Annotated[
        bool, typer.Option("--any-base-name", help="Take --base for theirs, whatever name they give it.")
    ] = False,
    data: Annotated[
        list[str] | None, typer.Option(help="NAME=FILE: prompts of an expert's domain, for the stage that follows.")
    ] = None,
    as_json: Json = False,
) -> None:
    quiet_libraries()
    from loramix.lifecycle.import_export import import_export
    from loramix.lifecycle.importing import import_experts, parsed_sources

    how: dict[str, Any] = {"base": base, "any_base_name": any_base_name}
    if len(sources) == 1 and "=" not in sources[0]:
        made = import_export(Path(sources[0]), output_dir, **how)
    else:
        files = parsed_sources(data or [], "NAME=FILE")
        made = import_experts(
            parsed_sources(sources), output_dir, method=method, data=files, console=progress_console(), **how
        )
    if as_json:
        print_json(made)
        return
    rows = [[str(value) for value in expert.values()] for expert in made["experts"]]
    print_table(f"{made['method']} on {made['base']}", list(made["experts"][0]), rows, words=True)
    result_console().print(_next(made, output_dir), highlight=False, markup=False, soft_wrap=True)


def _next(made: dict[str, Any], output_dir: str) -> str:
    """Returns what a user does now."""
    from loramix.pipeline import stages_of

    if made["ready"] == "yes":
        return f"Ready: loramix chat {output_dir}"
    last = [stage for stage in stages_of(made["method"]) if stage != "routers"][-1]
    files = " ".join(f"data.domains.{expert['name']}=FILE" for expert in made["experts"])
    if made["method"] == "moa":
        return (
            f"Its routers know nothing yet; pin an expert: loramix chat {output_dir} --expert NAME\n"
            f"Teach them from a few prompts of each domain: loramix train {output_dir} --stage routers {files}\n"
            f"or train experts and routers together: loramix train {output_dir} --stage {last} {files}"
        )
    return f"Next: loramix train {output_dir} --stage {last} {files}"


def list_(run: Run, as_json: Json = False) -> None:
    quiet_libraries()
    from loramix.lifecycle.editing import about_experts

    found = about_experts(run)
    if as_json:
        print_json(found)
        return
    rows = [[f"{value:,}" if isinstance(value, int) else str(value) for value in one.values()] for one in found]
    print_table(f"Experts of {run}", [head.replace("_", " ") for head in found[0]], rows)


def show(run: Run, name: Name, as_json: Json = False) -> None:
    quiet_libraries()
    from loramix.errors import ConfigError, did_you_mean
    from loramix.lifecycle.editing import about_experts

    found = {one["name"]: one for one in about_experts(run)}
    if name not in found:
        raise ConfigError(f"{name!r}: no such expert. There are {', '.join(found)}.{did_you_mean(name, found)}")
    if as_json:
        print_json(found[name])
        return
    rows = [[key.replace("_", " "), str(value)] for key, value in found[name].items()]
    print_table(f"{name}, an expert of {run}", ["", ""], rows, words=True)


def add(
    run: Run,
    name: Annotated[str, typer.Argument(help="Name of the new expert and its domain.")],
    data: Annotated[str, typer.Option(help="File, folder or Hub name with its examples.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="Settings of this training: num_train_epochs=2")] = None,
    no_replay: Annotated[
        bool, typer.Option("--no-replay", help="Do not show the routers the stored prompts of the other domains.")
    ] = False,
    as_json: Json = False,
) -> None:
    quiet_libraries()
    from loramix.lifecycle.adding import add_expert

    added = add_expert(run, name, data, progress_console(), overrides or [], replay=not no_replay)
    if as_json:
        print_json(asdict(added))
        return
    rows = [["its held-out responses, perplexity", f"{v:.3f} ({k})"] for k, v in added.perplexity.items()]
    if added.found is not None:
        rows.append(["its held-out prompts that reach it", f"{added.found:.1%}"])
    rows += [[f"stored prompts of {one} that go where they went", f"{share:.1%}"] for one, share in added.kept.items()]
    print_table(f"{name} joined {run}, trained on {added.examples} examples", ["", ""], rows)
    if added.lost:
        result_console().print(added.lost, highlight=False, soft_wrap=True)


def remove(run: Run, name: Name) -> None:
    quiet_libraries()
    from loramix.lifecycle.editing import remove_expert

    remove_expert(run, name)
    result_console().print(f"{name} is no longer in {run}.", highlight=False)


def rename(run: Run, name: Name, new: Annotated[str, typer.Argument(help="Its new name.")]) -> None:
    quiet_libraries()
    from loramix.lifecycle.editing import rename_expert

    rename_expert(run, name, new)
    result_console().print(f"{name} is called {new} now.", highlight=False)


def extract(
    run: Run,
    name: Name,
    output_dir: Annotated[Path, typer.Option("--output-dir", "-o", help="Folder for the LoRA.")],
    as_json: Json = False,
) -> None:
    quiet_libraries()
    from loramix.lifecycle.editing import extract_expert

    config = extract_expert(run, name, output_dir)
    if as_json:
        print_json(config)
        return
    result_console().print(
        f"{output_dir}: a PEFT LoRA of rank {config['r']}; PeftModel.from_pretrained(base, {str(output_dir)!r}).",
        highlight=False,
        soft_wrap=True,
    )
