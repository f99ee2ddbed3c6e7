"""`loramix validate CONFIG`: checks settings, data, and the adapter against the base's modules, without its weights."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from loramix.cli.output import print_json, quiet_libraries, result_console


def add_to(app: typer.Typer) -> None:
    app.command("validate", help="Check a YAML file and its data without training; writes nothing.")(validate)


def validate(
    config: Annotated[Path, typer.Argument(help="YAML file.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Settings over the file's: learning_rate=1e-4 ...")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the resolved settings as JSON.")] = False,
) -> None:
    quiet_libraries()
    from loramix.adapter_settings import adapter_config
    from loramix.corpus import read_all
    from loramix.experiment import as_yaml, load
    from loramix.methods import method_named
    from loramix.models import load_skeleton
    from loramix.tuner import check_fit

    loaded = load(config, overrides or [])
    experiment = loaded.experiment
    splits, unseen = read_all(experiment)
    if method_named(experiment.method).tuner == "loramix":
        check_fit(load_skeleton(experiment.model_name_or_path), adapter_config(experiment, list(splits)))
    counts = {domain: {"train": len(split.train), "test": len(split.test)} for domain, split in splits.items()}
    counts |= {domain: {"train": 0, "test": len(records)} for domain, records in unseen.items()}
    if as_json:
        print_json({"settings": loaded.experiment.model_dump(), "read_as": list(loaded.echoes), "examples": counts})
        return
    console = result_console()
    for echo in loaded.echoes:
        console.print(f"# {echo}", highlight=False, markup=False)
    console.print(as_yaml(loaded.experiment), highlight=False, markup=False)
    for domain, count in counts.items():
        console.print(f"# {domain}: {count['train']} to train on, {count['test']} to test on", highlight=False)
    console.print(f"{config} is good.", highlight=False)
