"""`loramix methods`: the table of methods."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

from loramix.cli.output import print_json, print_table


def add_to(app: typer.Typer) -> None:
    app.command("methods", help="List the methods: paper, router, scope, losses, stages.")(methods)


def methods(as_json: Annotated[bool, typer.Option("--json", help="Print the list as JSON.")] = False) -> None:
    from loramix.methods import METHODS

    if as_json:
        print_json([{**asdict(method), "losses": list(method.losses)} for method in METHODS.values()])
        return
    rows = [
        [
            method.name,
            method.paper,
            method.router.kind if method.router else "-",
            method.scope or "-",
            ", ".join(method.losses) or "-",
            " -> ".join(f"{stage.name} ({stage.data})" for stage in method.stages),
        ]
        for method in METHODS.values()
    ]
    print_table("Methods", ["name", "paper", "router", "scope", "losses beside LM", "stages"], rows)
