"""`loramix env`: versions and machine, for a bug report."""

from __future__ import annotations

from typing import Annotated

import typer

from loramix.cli.output import print_json


def add_to(app: typer.Typer) -> None:
    app.command("env", help="Show versions and machine, for a bug report.")(env)


def env(as_json: Annotated[bool, typer.Option("--json", help="Print as JSON.")] = False) -> None:
    from loramix.cache import cache_dir
    from loramix.environment import environment

    found = {**environment(), "cache": str(cache_dir())}
    if as_json:
        print_json(found)
        return
    for name, version in found.pop("packages").items():
        print(f"{name:14} {version}")
    for name, value in found.items():
        print(f"{name:14} {value}")
