"""`loramix methods`: the table of methods; `loramix methods show NAME`: one method's resolved parts."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from loramix.cli.output import print_json, print_table, result_console


def add_to(app: typer.Typer) -> None:
    group = typer.Typer(help="List the methods: paper, router, scope, losses, stages.", invoke_without_command=True)
    group.callback()(methods)
    group.command("show", help="Print the resolved parts of one method.")(show)
    app.add_typer(group, name="methods")


def methods(
    context: typer.Context,
    as_json: Annotated[bool, typer.Option("--json", help="Print the list as JSON.")] = False,
) -> None:
    if context.invoked_subcommand is not None:
        return
    from loramix.methods import METHODS

    if as_json:
        print_json([_listed(method.as_dict()) for method in METHODS.values()])
        return
    rows = [
        [
            method.name,
            method.paper.removeprefix("https://arxiv.org/abs/"),
            method.router.kind if method.router else "-",
            method.scope or "-",
            ", ".join(method.losses).replace("_", " ") or "-",
            " -> ".join(stage.name for stage in method.stages),
        ]
        for method in METHODS.values()
    ]
    print_table("Methods", ["name", "arXiv", "router", "scope", "losses beside LM", "stages"], rows, words=True)


def _listed(method: dict[str, Any]) -> dict[str, Any]:
    """Returns the columns of the table first, all other choices after them."""
    return {key: method[key] for key in ("name", "paper", "router", "scope", "losses", "stages")} | method


def show(
    name: Annotated[str, typer.Argument(help="A name in `loramix methods`.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print the parts as JSON.")] = False,
) -> None:
    from loramix.methods import method_named

    method = method_named(name).as_dict()
    if as_json:
        print_json(_listed(method))
        return
    import yaml

    console = result_console()
    console.print(f"{method.pop('title')}: {method.pop('summary')}", highlight=False, markup=False)
    console.print(method.pop("equation"), highlight=False, markup=False)
    console.print(yaml.safe_dump(method, sort_keys=False), highlight=False, markup=False)
