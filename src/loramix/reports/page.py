"""One self-contained HTML page: tables, figures and what was run. No script, no request, readable without colour."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from loramix.reports import plots, routing_plots, tables
from loramix.reports.plots import Drawing
from loramix.reports.reading import Content
from loramix.reports.tables import Table


@dataclass(frozen=True)
class Part:
    """One run on the page.

    Attributes:
        identity: an HTML id.
        content: what was measured.
        headline: sentences that say what came out.
        quality, tests, later: tables before the figures, those to unfold, and those after the figures.
        drawings: figures by heading.
    """

    identity: str
    content: Content
    headline: list[str]
    quality: list[Table]
    tests: list[Table]
    later: list[Table]
    drawings: list[tuple[str, list[Drawing]]]


def page(contents: Sequence[Content]) -> str:
    """Returns the page of one or several runs; the same bytes for the same content."""
    environment = Environment(
        loader=PackageLoader("loramix.reports"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    parts = [_part(content, f"run{number}-" if len(contents) > 1 else "") for number, content in enumerate(contents)]
    title = contents[0]["title"] if len(contents) == 1 else f"{len(contents)} runs"
    return environment.get_template("page.html").render(title=title, parts=parts)


def _part(content: Content, prefix: str) -> Part:
    groups: list[tuple[str, list[Drawing | None]]] = [
        ("What domains do to each other", [plots.interference(content, prefix)]),
        ("Routing", list(routing_plots.routing(content, prefix))),
        ("Experts at work", list(plots.expert_use(content, prefix))),
        ("Experts compared", list(plots.similarity(content, prefix))),
        ("Training", list(plots.curves(content, prefix))),
        ("Cost", [plots.cost_and_quality(content, prefix)]),
    ]
    kept = [(title, [drawing for drawing in group if drawing is not None]) for title, group in groups]
    quality = [*tables.quality(content), tables.as_in_moa(content), *tables.routers(content)]
    later = [tables.cost(content), tables.data(content), tables.overlap(content), tables.signatures(content)]
    return Part(
        identity=f"{prefix}run",
        content=content,
        headline=headline(content),
        quality=[table for table in quality if table is not None],
        tests=tables.paired(content),
        later=[table for table in later if table is not None],
        drawings=[(title, group) for title, group in kept if group],
    )


def headline(content: Content) -> list[str]:
    """Returns what came out, in sentences that claim no more than the intervals allow."""
    said = []
    for metric, about in content["metrics"].items():
        rows = [
            row
            for row in content["rows"]
            if row["routing"] is None
            and row["setting"] != "none"
            and (row["scores"].get(metric) or {}).get("average") is not None
        ]
        if len(rows) < 2:
            continue
        ordered = sorted(
            rows, key=lambda row: row["scores"][metric]["average"]["mean"], reverse=about["better"] == "higher"
        )
        best = ordered[0]
        if best["scores"][metric]["average"]["mean"] == ordered[1]["scores"][metric]["average"]["mean"]:
            continue
        mean = best["scores"][metric]["average"]["mean"]
        text = f"{about['title']}: {tables.name_of(best)} has the best mean over domains, {mean:.{about['digits']}f}"
        test = _test(content, metric, best["id"])
        said.append(f"{text}{test}.")
    return said


def _test(content: Content, metric: str, row: str) -> str:
    for one in content["paired"]:
        average: dict[str, Any] | None = one["average"]
        if one["metric"] == metric and one["row"] == row and average is not None:
            apart = average["low"] > 0 or average["high"] < 0
            names = {other["id"]: tables.name_of(other) for other in content["rows"]}
            verdict = "the interval of the difference leaves out 0" if apart else "within the test data's uncertainty"
            return f"; against {names[one['against']]} {average['difference']:+.3g} ({verdict})"
    return ""
