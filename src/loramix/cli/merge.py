"""`loramix experts merge RUN`: one expert into the base, or several into one LoRA, with the error measured."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from loramix.cli.output import print_json, print_table, quiet_libraries, result_console


def add_to(app: typer.Typer) -> None:
    app.command("merge", help="Fold one expert into the base, or make one LoRA of a fixed weighted sum of experts.")(
        merge
    )


def merge(
    run: Annotated[Path, typer.Argument(help="Folder of a run.")],
    more: Annotated[list[str] | None, typer.Argument(help="Further weights, NAME=NUMBER.", metavar="")] = None,
    expert: Annotated[str | None, typer.Option(help="Fold this expert into the base's weights.")] = None,
    weights: Annotated[
        list[str] | None,
        typer.Option(help="One LoRA of a weighted sum: NAME=NUMBER NAME=NUMBER ...; or learned, for lorahub."),
    ] = None,
    rank: Annotated[int | None, typer.Option(help="The nearest LoRA of this rank instead of the exact one.")] = None,
    combination: Annotated[
        str | None,
        typer.Option(help="A way of PEFT's: linear, ties, dare_linear, dare_ties, magnitude_prune, ..._svd."),
    ] = None,
    density: Annotated[float | None, typer.Option(help="With --combination: share of values kept.")] = None,
    seed: Annotated[int | None, typer.Option(help="With dare: of its pruning; 0 by default.")] = None,
    into_base: Annotated[bool, typer.Option("--into-base", help="Fold the result into the base's weights.")] = False,
    output_dir: Annotated[Path | None, typer.Option("--output-dir", "-o", help="A new folder for the result.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    quiet_libraries()
    from loramix.lifecycle.merge import merge_experts
    from loramix.lifecycle.merge_choice import MergeChoice, parsed_weights

    choice = MergeChoice(
        expert=expert,
        weights=parsed_weights([*(weights or []), *(more or [])]),
        rank=rank,
        combination=combination,
        density=density,
        seed=seed,
        into_base=into_base,
    )
    report = merge_experts(run, output_dir, choice)
    if as_json:
        print_json(report)
        return
    result_console().print(f"{output_dir}: a {report['what']}", highlight=False, markup=False, soft_wrap=True)
    print_table("", ["", ""], _rows(report), words=True)
    for warning in _warnings(report):
        result_console().print(warning, highlight=False, markup=False, soft_wrap=True)


def _warnings(report: dict[str, Any]) -> list[str]:
    """Returns what a user must know before he uses the result."""
    found = []
    if not report["exact_up_to_rounding"]:
        error = report["relative_error"]["overall"]
        found.append(
            f"Not exact: it differs from the weighted sum by {error:.1%} of its size. Measure it on your data."
        )
    lost = report.get("rounding", {}).get("overall", 0.0)
    if lost > 0.01:
        found.append(
            f"Rounding to {report['dtype']} alters {lost:.1%} of the change, which is small beside the weights. A LoRA "
            "beside the base (loramix experts extract, or merge without --into-base) keeps all of it."
        )
    return found


def _rows(report: dict[str, Any]) -> list[list[str]]:
    error = report["relative_error"]
    rows = [
        ["base", report["base"]],
        ["experts", ", ".join(f"{name} x {weight:g}" for name, weight in report["weights"].items())],
        ["way", f"{report['way']}, rank {report['rank']}"],
    ]
    if report["way"] != "expert":
        rows.append(
            ["relative error", f"{error['overall']:.3g}; worst {error['worst']:.3g} in {error['worst_module']}"]
        )
    if "rounding" in report:
        rounding, answers = report["rounding"], report["answers"]
        rows += [
            [
                f"rounding to {report['dtype']}",
                f"{rounding['overall']:.3g} of the change, {rounding['relative_to_the_weights']:.3g} of the weights; "
                f"worst {rounding['worst']:.3g} of the change in {rounding['worst_module']}",
            ],
            ["held against", answers["beside"]],
            [
                "logits",
                f"differ by {answers['largest_difference']:.3g} at most (largest {answers['largest_logit']:.3g}); same "
                f"next token at {answers['same_next_token']:.1%} of {answers['tokens']} positions",
            ],
        ]
    return rows
