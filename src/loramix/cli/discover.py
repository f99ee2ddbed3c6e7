"""`loramix experts discover --data F --output-dir OUT`: finds domains in rows that have no labels."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated, Any

import typer

from loramix.cli.output import print_json, print_table, progress_console, quiet_libraries, result_console


def add_to(app: typer.Typer) -> None:
    app.command(
        "discover", help="Find domains in data without labels: cluster prompts, name them, write them labelled."
    )(discover)


def discover(
    data: Annotated[
        list[str],
        typer.Option(
            "--data",
            "-d",
            help="File, folder, pattern or Hub name; may be given several times. NAME=... "
            "tells the true label of all its rows, for the report.",
        ),
    ],
    output_dir: Annotated[Path, typer.Option("--output-dir", "-o", help="Folder for the labelled data set.")],
    test: Annotated[
        list[str] | None, typer.Option(help="Rows to measure on; by default test parts, else some are held out.")
    ] = None,
    base: Annotated[str | None, typer.Option(help="The base that reads the prompts; by default the built-in.")] = None,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    layer: Annotated[int | None, typer.Option(help="Whose states are averaged; by default the middle one.")] = None,
    k: Annotated[int | None, typer.Option("--k", help="How many domains; by default chosen by silhouette.")] = None,
    max_k: Annotated[int, typer.Option("--max-k", help="The most that are tried.")] = 12,
    max_rows: Annotated[
        int | None, typer.Option(help="Rows the clusters are fitted to at most; others join the nearest.")
    ] = None,
    max_length: Annotated[int, typer.Option(help="Tokens of a prompt that are read at most.")] = 512,
    label_column: Annotated[
        str | None, typer.Option(help="Column with true labels; by default domain, task, channel or task_id, if any.")
    ] = None,
    test_fraction: Annotated[float, typer.Option(help="Part held out where there is no test part.")] = 0.1,
    seed: Annotated[int, typer.Option(help="Of what is held out, of the rows fitted to and of k-means.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print discovered.json.")] = False,
) -> None:
    quiet_libraries()
    from loramix.lifecycle.discover import discover as find
    from loramix.models import BUILTIN

    report = find(
        data,
        output_dir,
        test=test or [],
        base=base or BUILTIN,
        dtype=dtype,
        layer=layer,
        k=k,
        max_k=max_k,
        max_rows=max_rows,
        max_length=max_length,
        label_column=label_column,
        test_fraction=test_fraction,
        seed=seed,
        console=progress_console(),
    )
    if as_json:
        print_json(report)
    else:
        _show(report, output_dir)


def _show(report: dict[str, Any], folder: Path) -> None:
    agreed = report["agreement"]
    rows = []
    for one in report["clusters"]:
        row = [one["name"], f"{one['train']} + {one['test']}", ", ".join(one["words"][:6]) or "-"]
        if agreed:
            row.append(_majority(agreed["table"].get(one["name"], {})))
        rows.append(row)
    chosen = "as given" if report["k_given"] else "chosen by silhouette"
    heads = ["cluster", "rows (train + test)", "salient words", *(["true label, share"] if agreed else [])]
    print_table(f"{report['k']} clusters ({chosen})", heads, rows, words=True)
    console = result_console()
    tried = ", ".join(f"{k}: {value:.3f}" for k, value in report["silhouette"].items())
    console.print(f"silhouette by number of clusters  {tried}", highlight=False, soft_wrap=True)
    if agreed:
        console.print(
            f"against {agreed['labels']} true labels on {agreed['rows']} rows: purity {agreed['purity']:.1%}, "
            f"normalised mutual information {agreed['normalised_mutual_information']:.3f}, adjusted Rand index "
            f"{agreed['adjusted_rand_index']:.3f}",
            highlight=False,
            soft_wrap=True,
        )
    if report["moved_to_test"]:
        console.print(
            f"{report['moved_to_test']} rows were moved to the test part: every domain needs some to measure on.",
            highlight=False,
            soft_wrap=True,
        )
    where, base = shlex.quote(str(folder)), shlex.quote(report["base"])
    console.print(
        f"Everything is in {folder}. Look at the examples in discovered.json, then train an expert for each:\n"
        f"  loramix train recipes/discovered/moa.yaml data.path={where} model_name_or_path={base} "
        "output_dir=runs/discovered",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )


def _majority(counts: dict[str, int]) -> str:
    """Returns "maths, 98.5%" for a cluster's rows by true label, the most frequent first."""
    if not counts:
        return "-"
    label, most = next(iter(counts.items()))
    return f"{label}, {most / sum(counts.values()):.1%}"
