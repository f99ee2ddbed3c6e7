"""`loramix validate CONFIG`: checks settings, data, and the adapter against the base's modules, without its weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from loramix.cli.output import print_json, quiet_libraries, result_console

if TYPE_CHECKING:
    from loramix.planning.plan import StagePlan
    from loramix.settings import Experiment


def add_to(app: typer.Typer) -> None:
    app.command("validate", help="Check a YAML file and its data without training; writes nothing.")(validate)


def validate(
    config: Annotated[Path, typer.Argument(help="YAML file.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Settings over the file's: learning_rate=1e-4 ...")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the resolved settings as JSON.")] = False,
    with_plan: Annotated[
        bool, typer.Option("--plan", help="Say what training will take: parameters, FLOPs, memory, time.")
    ] = False,
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
    stages = planned(experiment) if with_plan else []
    if as_json:
        content = {"settings": loaded.experiment.model_dump(), "read_as": list(loaded.echoes), "examples": counts}
        print_json(content | ({"plan": [asdict(stage) for stage in stages]} if with_plan else {}))
        return
    console = result_console()
    for echo in loaded.echoes:
        console.print(f"# {echo}", highlight=False, markup=False)
    console.print(as_yaml(loaded.experiment), highlight=False, markup=False)
    for domain, count in counts.items():
        console.print(f"# {domain}: {count['train']} to train on, {count['test']} to test on", highlight=False)
    if with_plan:
        show(stages, console)
    console.print(f"{config} is good.", highlight=False)


def planned(experiment: Experiment) -> list[StagePlan]:
    """Returns what each stage and each control will take."""
    from loramix.corpus import encode_all
    from loramix.models import load_tokenizer
    from loramix.planning.plan import plan

    return plan(experiment, encode_all(experiment, load_tokenizer(experiment.model_name_or_path)))


def show(stages: Sequence[StagePlan], console: Console) -> None:
    """Prints the plan, stage by stage: a table of so many numbers does not fit a window."""
    import torch

    if not stages:
        console.print("# no stage of this method takes gradient steps with experts: nothing to plan", highlight=False)
        return
    for one in stages:
        parts = ", ".join(f"{name} {size / 2**20:,.0f}" for name, size in one.memory_bytes.items())
        lines = (
            one.stage,
            f"  parameters  {one.trained:,} trained of {one.parameters:,}",
            f"  tokens      {one.tokens:,}, {one.flops_per_token / 1e6:,.0f} MFLOP each",
            f"  memory      {sum(one.memory_bytes.values()) / 2**20:,.0f} MiB at the peak: {parts}",
            f"  time        {one.seconds / 60:,.1f} min",
        )
        console.print("\n".join(lines), highlight=False, markup=False)
    console.print(f"# all training: {sum(one.seconds for one in stages) / 60:,.1f} min", highlight=False)
    for one in stages:
        if one.note:
            console.print(f"# time of {one.stage}: {one.note}", highlight=False, markup=False)
    threads = torch.get_num_threads()
    console.print(
        f"# time: on this machine when nothing else runs on it ({threads} threads); docs/plan.md says how far off"
    )
