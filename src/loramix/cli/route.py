"""`loramix route RUN --text T`: which expert would answer, and why."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

from loramix.cli.output import print_json, print_table, quiet_libraries

if TYPE_CHECKING:
    from loramix.tuner.routes import Route


def add_to(app: typer.Typer) -> None:
    app.command("route", help="Show which expert answers a text, how sure the routers are and what each layer says.")(
        route
    )


def route(
    run: Annotated[Path, typer.Argument(help="Folder of a run.")],
    text: Annotated[list[str], typer.Option("--text", "-t", help="A prompt; may be given several times.")],
    decision: Annotated[
        str | None, typer.Option(help="last, vote, per_layer, layer:k; the run's own by default.")
    ] = None,
    abstain: Annotated[
        bool | None,
        typer.Option("--abstain/--no-abstain", help="Send prompts unlike all domains to the base; on if calibrated."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the routes as JSON.")] = False,
) -> None:
    quiet_libraries()
    from loramix.errors import ConfigError
    from loramix.methods import method_named
    from loramix.opening import open_model, open_run

    folder, experiment = open_run(run)
    if method_named(experiment.method).settled_by != "prompt":
        raise ConfigError(
            f"{run}: method {experiment.method} settles no expert for a prompt, so there is nothing to show. Runs of "
            "moa can be asked."
        )
    model, tokenizer = open_model(experiment, folder)
    routes = model.route(text, tokenizer, decision=decision, abstain=abstain)
    if as_json:
        print_json([{"text": one, **asdict(way)} for one, way in zip(text, routes, strict=True)])
        return
    for one, way in zip(text, routes, strict=True):
        print_route(one, way)


def print_route(text: str, way: Route) -> None:
    """Prints which expert answers a text, what each would get, and which layers are for it."""
    rows = []
    for expert, probability in sorted(way.probabilities.items(), key=lambda pair: -pair[1]):
        layers = [scope.rpartition(".")[2] for scope, vote in way.votes.items() if vote == expert]
        rows.append([expert, f"{probability:.1%}", str(len(layers)), _ranges([int(n) for n in layers])])
    title = escape(f"{text}\n-> {way.expert} ({_why(way)})")
    print_table(title, ["expert", "probability", "votes", "layers"], rows)


def _why(way: Route) -> str:
    """Returns by which decision, and where it was asked, how far the prompt is from all domains."""
    if way.score is None or way.threshold is None:
        return f"by {way.decision}"
    sign = ">" if way.score > way.threshold else "<="
    return f"by {way.decision}; score {way.score:.3f} {sign} threshold {way.threshold:.3f}"


def _ranges(numbers: list[int]) -> str:
    """Returns "0-3, 7" for [0, 1, 2, 3, 7]."""
    parts: list[list[int]] = []
    for number in sorted(numbers):
        if parts and number == parts[-1][-1] + 1:
            parts[-1].append(number)
        else:
            parts.append([number])
    return ", ".join(f"{p[0]}-{p[-1]}" if len(p) > 1 else str(p[0]) for p in parts)
