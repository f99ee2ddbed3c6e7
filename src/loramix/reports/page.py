"""One self-contained HTML page: tables, figures and what was run. No script, no request, readable without colour."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from loramix.reports import abstention, expert_plots, plots, quality_tables, routing_plots, run_tables
from loramix.reports.drawing import Drawing
from loramix.reports.reading import Content
from loramix.reports.tables import Table, bases, competes, names


@dataclass(frozen=True)
class Part:
    """One run on the page.

    Attributes:
        identity: an HTML id.
        content: what was measured.
        names: row id -> what it is called.
        about: a sentence that says what was run.
        headline: sentences that say what came out.
        unmeasured: a sentence that names rows without results; may be empty.
        glance: the figures beside the headline.
        quality, tests, later: tables before the figures, those to unfold, and those after the figures.
        drawings: figures by heading.
    """

    identity: str
    content: Content
    names: dict[str, str]
    about: str
    headline: list[str]
    unmeasured: str
    glance: list[Drawing]
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
    groups = [
        ("What domains do to each other", plots.interference(content, prefix)),
        ("Routing", [*routing_plots.routing(content, prefix), *abstention.drawings(content, prefix)]),
        ("Experts at work", expert_plots.expert_use(content, prefix)),
        ("Experts compared", expert_plots.similarity(content, prefix)),
        ("Training", plots.curves(content, prefix)),
        ("Cost", plots.cost_and_quality(content, prefix)),
    ]
    quality = [*quality_tables.quality(content), *quality_tables.as_in_moa(content), *quality_tables.judge(content)]
    later = [run_tables.cost, run_tables.data, run_tables.overlap, run_tables.signatures]
    return Part(
        identity=f"{prefix}run",
        content=content,
        names=names(content),
        about=about(content),
        headline=headline(content),
        unmeasured=quality_tables.unmeasured(content),
        glance=plots.means(content, prefix),
        quality=[*quality, *run_tables.routers(content), *abstention.table(content)],
        tests=quality_tables.paired(content),
        later=[table for make in later if (table := make(content)) is not None],
        drawings=[(title, group) for title, group in groups if group],
    )


def about(content: Content) -> str:
    """Returns what was run, in one sentence."""
    seeds = max((len(row["seeds"]) for row in content["rows"]), default=0)
    tests = sum(parts["test"]["examples"] for parts in content["data"].values())
    counts = [
        (len(content["rows"]), "row"),
        (len(content["domains"]), "domain"),
        (seeds, "seed"),
        (tests, "test example"),
    ]
    said = ", ".join(f"{count:,} {what}{'' if count == 1 else 's'}" for count, what in counts if count)
    named = ", ".join(filter(None, bases(content)))
    return f"{named}: {said}." if named else f"{said}."


def headline(content: Content) -> list[str]:
    """Returns what came out, in sentences that claim no more than the intervals allow."""
    said = [_best(content, metric, base) for metric in content["metrics"] for base in bases(content)]
    return [sentence for sentence in said if sentence]


def _best(content: Content, metric: str, base: str) -> str:
    about = content["metrics"][metric]
    digits, named = about["digits"], names(content)
    values = {
        row["id"]: row["scores"][metric]["average"]["mean"]
        for row in content["rows"]
        if row["base"] == base and competes(row) and (row["scores"].get(metric) or {}).get("average") is not None
    }
    ordered = sorted(values, key=values.__getitem__, reverse=about["better"] == "higher")
    if len(ordered) < 2 or values[ordered[0]] == values[ordered[1]]:
        return ""
    best, second = ordered[:2]
    text = f"{about['title']}: {named[best]} has the best mean over domains, {values[best]:.{digits}f}"
    text += f"; next {named[second]}, {values[second]:.{digits}f}"
    return f"{text}{_test(content, metric, best, second)}."


def _test(content: Content, metric: str, best: str, second: str) -> str:
    """Returns what the paired test says of the best row, or of the second where the best is the one tested against."""
    named = names(content)
    for row in (best, second):
        for one in content["paired"]:
            average: dict[str, Any] | None = one["average"]
            if one["metric"] != metric or one["row"] != row or average is None:
                continue
            if row == second and one["against"] != best:
                continue
            apart = average["low"] > 0 or average["high"] < 0
            digits = content["metrics"][metric]["digits"]
            span = f"95 % interval {average['low']:+.{digits}f} to {average['high']:+.{digits}f}"
            verdict = f"{span}, which leaves out 0" if apart else f"{span}: no difference that these test data can show"
            return f". {named[row]} against {named[one['against']]}: {average['difference']:+.{digits}f} ({verdict})"
    return ""
