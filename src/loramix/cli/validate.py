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
    from loramix.data.domains import read_domains
    from loramix.experiment import as_yaml, load
    from loramix.methods import method_named
    from loramix.models import load_skeleton
    from loramix.tuner import check_fit

    loaded = load(config, overrides or [])
    experiment, data = loaded.experiment, loaded.experiment.data
    splits = read_domains(
        {domain: source or "" for domain, source in data.domains.items()},
        labelled=data.path,
        domain_column=data.domain_column,
        test_fraction=data.test_fraction,
        max_train_examples=data.max_train_examples,
        max_test_examples=data.max_test_examples,
        seed=loaded.experiment.seed,
    )
    if method_named(experiment.method).tuner == "loramix":
        check_fit(load_skeleton(experiment.model_name_or_path), adapter_config(experiment, list(splits)))
    counts = {domain: {"train": len(split.train), "test": len(split.test)} for domain, split in splits.items()}
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
