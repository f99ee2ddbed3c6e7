"""`loramix calibrate RUN`: prompts that no expert fits go to the base."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from loramix.cli.output import print_json, print_table, progress_console, quiet_libraries, result_console


def add_to(app: typer.Typer) -> None:
    app.command("calibrate", help="Let a run's model leave prompts to the base that are unlike all its domains.")(
        calibrate
    )


def calibrate(
    run: Annotated[Path, typer.Argument(help="Folder of a finished run of moa.")],
    keep: Annotated[
        float, typer.Option(min=0, max=1, help="Share of held-out prompts that still gets an expert.")
    ] = 0.95,
    as_json: Annotated[bool, typer.Option("--json", help="Print what abstention.json holds.")] = False,
) -> None:
    quiet_libraries()
    from loramix.lifecycle.calibrate import calibrate_run

    found = calibrate_run(run, progress_console(), keep)
    if as_json:
        print_json(found)
    else:
        _show(found)


def _show(found: dict[str, Any]) -> None:
    console = result_console()
    rows = [[domain, str(one["prompts"]), f"{one['kept']:.1%}"] for domain, one in found["held"].items()]
    print_table("Held-out prompts of the learned domains", ["domain", "prompts", "keep their expert"], rows)
    title = {"unseen": "Prompts of unseen domains", "left out": "If a domain had no expert"}.get(found["against"])
    if title is not None:
        rows = [
            [domain, str(one["prompts"]), f"{one['abstained']:.1%}", f"{one['auroc']:.3f}"]
            for domain, one in found["outside"].items()
        ]
        rows.append(["mean", "", f"{found['mean_abstained']:.1%}", f"{found['mean_auroc']:.3f}"])
        print_table(title, ["domain", "prompts", "go to the base", "AUROC"], rows)
    console.print(_about(found), highlight=False, soft_wrap=True)


def _about(found: dict[str, Any]) -> str:
    from loramix.reports.abstention import AGAINST

    return (
        f"Threshold {found['threshold']:.4f} on what the router of {found['layer']} reads, set to keep "
        f"{found['keep']:.0%} of the held-out prompts shown. {AGAINST[found['against']]} It is on from now on; "
        "--no-abstain of route and chat, abstain=False in Python, turn it off for a request."
    )
