"""`loramix demo`: the main job on real data, from nothing to a routed model and a table, on a laptop."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from loramix.cli.output import print_json, progress_console, quiet_libraries, result_console

SETTINGS: dict[str, Any] = {
    "method": "moa",
    "controls": ["base", "single_long", "mixed"],
    "data": {
        "max_train_examples": 32,
        "max_test_examples": 32,
        "max_length": 192,
        "truncation": "right",
    },
    "adapter": {"r": 8, "lora_alpha": 16, "target_modules": "all-linear"},
    "training": {
        "per_device_train_batch_size": 4,
        "num_train_epochs": 1,
        "learning_rate": 1e-3,
        "router_learning_rate": 1e-2,
        "warmup_steps": 0.1,
        "logging_steps": 8,
    },
    "joint_stage": {"learning_rate": 5e-4},
}
"""Sizes chosen so that everything, installation included, ends within 20 minutes on two cores."""


def add_to(app: typer.Typer) -> None:
    app.command(
        "demo", help="Four real domains, a small real base: train, compare, route and answer, in about 15 minutes."
    )(demo)


def demo(
    out: Annotated[Path, typer.Option("--out", help="Folder of the run; an earlier demo there is replaced.")] = Path(
        "runs/demo"
    ),
    as_json: Annotated[bool, typer.Option("--json", help="Print the results as JSON.")] = False,
    overrides: Annotated[list[str] | None, typer.Argument(help="Settings over the demo's: seed=1 ...")] = None,
) -> None:
    quiet_libraries()
    from loramix.cli.train import show
    from loramix.data.demo import demo_data
    from loramix.experiment import build, load
    from loramix.pipeline import run_experiment
    from loramix.run_folder import RunFolder

    domains = {domain: str(folder) for domain, folder in demo_data().items()}
    settings = {"output_dir": str(out), **SETTINGS, "data": {"domains": domains, **SETTINGS["data"]}}
    loaded = build(settings, overrides or [], where="the demo's settings")
    if RunFolder(out).config.is_file() and set(load(RunFolder(out).config).experiment.data.domains) == set(domains):
        RunFolder(out).clear()
    console = progress_console()
    results = run_experiment(loaded.experiment, console)
    if as_json:
        print_json(results)
        return
    show(results)
    minutes = results["seconds"] / 60
    result_console().print(
        f"\n{minutes:.1f} minutes. Everything is in {out}. Ask it yourself:\n"
        f'  loramix route {out} --text "What is a stock split?"\n  loramix chat {out}',
        highlight=False,
        markup=False,
    )
