"""`loramix train CONFIG [key=value ...]`"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from loramix.cli.output import print_json, print_table, progress_console, quiet_libraries, result_console
from loramix.errors import ConfigError

TITLES = {"single": "single LoRA", "single_long": "single LoRA, as long", "mixed": "mixed LoRA"}


def add_to(app: typer.Typer) -> None:
    app.command("train", help="Train the experiment of a YAML file and measure it on held-out data.")(train)


def train(
    config: Annotated[
        Path, typer.Argument(help="YAML file, or the folder of a run; see recipes/ and docs/settings.md.")
    ],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Settings over the file's: learning_rate=1e-4 ...")
    ] = None,
    stage: Annotated[
        str | None,
        typer.Option(
            help="One stage alone: experts; or, from the experts in the run's folder, joint (its name in `loramix "
            "methods show`), or routers with the experts as they are."
        ),
    ] = None,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume", help="Go on with the run in output_dir where it was ended; begin it if there is none."
        ),
    ] = False,
    force: Annotated[
        bool, typer.Option("--force", help="With --resume: also where settings, base or data differ from the run's.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the results as JSON.")] = False,
) -> None:
    quiet_libraries()
    from loramix.experiment import build, load, read_yaml
    from loramix.pipeline import run_experiment
    from loramix.resuming import Resume
    from loramix.run_folder import RunFolder

    if force and not resume:
        raise ConfigError("--force says how to go on with a run. Give it with --resume.")

    if config.is_dir():  # a run's folder may have moved since its settings were written
        file = RunFolder.opened(config).config
        loaded = build({**read_yaml(file), "output_dir": str(config)}, overrides or [], where=str(file))
    else:
        loaded = load(config, overrides or [])
    console = progress_console()
    for echo in loaded.echoes:
        console.print(echo, highlight=False)
    results = run_experiment(loaded.experiment, console, stage, Resume(resume, force))
    if as_json:
        print_json(results)
    else:
        show(results)
        result_console().print(f"Everything is in {loaded.experiment.output_dir}", highlight=False)


def show(results: dict[str, Any]) -> None:
    """Prints the tables of a run: perplexity by domain and model, router accuracy by domain and decision."""
    domains = results["domains"]
    models = list(dict.fromkeys(row["model"] for row in results["rows"]))
    cells = {(row["domain"], row["model"]): row["perplexity"] for row in results["rows"]}
    rows = [[d, *(_number(cells.get((d, m))) for m in models)] for d in domains]
    means = []
    for m in models:
        column = [cells[d, m] for d in domains if (d, m) in cells]
        means.append(_number(sum(column) / len(column) if len(column) == len(domains) else None))
    heads = ["domain", *(_title(m) for m in models)]
    print_table("Perplexity on held-out responses (lower is better)", heads, [*rows, ["mean", *means]])
    if "router_accuracy" in results:
        _show_routers(results)
    console = result_console()
    for one in results["examples"]:
        console.print(f"\n[bold]{one['domain']}[/bold]", highlight=False)
        console.print(f"  prompt    {_short(one['prompt'])}", markup=False, highlight=False)
        if "expert" in one:
            sure = "" if one["probability"] is None else f" ({one['probability']:.1%})"
            console.print(f"  expert    {one['expert']}{sure}", markup=False, highlight=False)
        console.print(f"  answer    {_short(one['answer'])}", markup=False, highlight=False)
        console.print(f"  reference {_short(one['reference'])}", markup=False, highlight=False)


def _show_routers(results: dict[str, Any]) -> None:
    domains = results["domains"]
    decisions = list(results["router_accuracy_overall"])
    rows = [[d, *(f"{results['router_accuracy'][d][x]:.1%}" for x in decisions)] for d in domains]
    rows.append(["all", *(f"{results['router_accuracy_overall'][x]:.1%}" for x in decisions)])
    title = f"Router accuracy on {results['router_prompts']} held-out prompts, by decision"
    print_table(title, ["domain", *decisions], rows)
    if results["router_accuracy_overall"]["last"] < 1:
        counts = results["router_confusion"]["last"]
        rows = [[d, *map(str, row)] for d, row in zip(domains, counts, strict=True)]
        print_table("Where prompts went under the decision of the last router", ["domain", *domains], rows)


def _title(model: str) -> str:
    """Returns the heading of a model's column: "MoA, oracle" for moa_oracle."""
    from loramix.methods import METHODS

    name, _, how = model.partition("_")
    if model in TITLES or name not in METHODS:
        return TITLES.get(model, model)
    return METHODS[name].title.partition(" (")[0] + (f", {how}" if how else "")


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _short(text: str, most: int = 200) -> str:
    flat = " ".join(text.split())
    return flat if len(flat) <= most else flat[: most - 1] + "…"
