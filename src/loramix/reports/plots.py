"""The figures of a report. Each comes with a sentence that says what it shows and a table of what is drawn."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from loramix.reports import svg
from loramix.reports.reading import Content
from loramix.reports.tables import NONE, Cell, Table, name_of

_MARKERS = ("o", "s", "^", "D", "v")


@dataclass(frozen=True)
class Drawing:
    """A figure.

    Attributes:
        name: unique in the page; an HTML id.
        title, caption: what it is, and what can be seen in it.
        svg: the drawing.
        table: what is drawn, for those who cannot see it.
    """

    name: str
    title: str
    caption: str
    svg: str
    table: Table


def interference(content: Content, prefix: str = "") -> Drawing | None:
    """Returns how each mixture differs from the single LoRA of each domain: what the domains do to each other."""
    by_id = {row["id"]: row for row in content["rows"]}
    metric = next(iter(content["metrics"]), None)
    single = by_id.get("lora/single")
    if metric is None or single is None:
        return None
    alone = single["scores"].get(metric, {}).get("by_domain", {})
    rows = [r for r in content["rows"] if r["setting"] == "mixture" and r["routing"] is None and metric in r["scores"]]
    domains = [domain for domain in content["domains"] if domain in alone]
    if not rows or not domains:
        return None
    values = [
        [_relative(row["scores"][metric]["by_domain"].get(domain), alone[domain]) for domain in domains] for row in rows
    ]
    names = [name_of(row).removesuffix(", mixed") for row in rows]
    down = content["metrics"][metric]["better"] == "lower"
    helped = sum(v is not None and (v < 0) == down and v != 0 for row in values for v in row)
    count = sum(v is not None for row in values for v in row)
    title = content["metrics"][metric]["title"]
    caption = (
        f"{title} of each mixture against the LoRA trained on that domain alone, in per cent. "
        f"{'Below' if down else 'Above'} 0 the mixture is better: {helped} of {count} cells."
    )
    with svg.style():
        drawn = svg.figure(2.2 + 0.85 * len(domains), 1.1 + 0.34 * len(rows))
        axes = drawn.add_subplot()
        most = max((abs(v) for row in values for v in row if v is not None), default=1.0) or 1.0
        heat(axes, values, names, domains, "PuOr_r" if down else "PuOr", -most, most, "{:+.0f}")
        text = svg.as_svg(drawn, f"{prefix}interference")
    told = [(Cell(n), *(Cell(_told(v, "{:+.1f} %")) for v in vs)) for n, vs in zip(names, values, strict=True)]
    table = Table("", "", ("", *domains), tuple(told))
    return Drawing(f"{prefix}interference", "Interference: mixture against single", caption, text, table)


def _relative(value: Mapping[str, Any] | None, alone: Mapping[str, Any]) -> float | None:
    if value is None or not alone["mean"]:
        return None
    return float(100 * (value["mean"] / alone["mean"] - 1))


def _told(value: float | None, form: str) -> str:
    return NONE if value is None else form.format(value)


def heat(
    axes: Axes,
    values: Sequence[Sequence[float | None]],
    rows: Sequence[str],
    columns: Sequence[str],
    colours: str,
    low: float,
    high: float,
    form: str | None,
) -> None:
    """Draws numbers as coloured cells, with the number in each if `form` is given."""
    grid = np.array([[np.nan if v is None else v for v in row] for row in values], dtype=float)
    image = axes.imshow(grid, cmap=colours, vmin=low, vmax=high, aspect="auto", interpolation="nearest")
    named = [_short(column, 14) for column in columns]
    axes.set_xticks(range(len(columns)), named, rotation=35, ha="right", rotation_mode="anchor")
    axes.set_yticks(range(len(rows)), [_short(r, 28) for r in rows])
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    if form is None:
        return
    for (i, j), value in np.ndenumerate(grid):
        if not np.isnan(value):
            red, green, blue, _ = image.cmap(image.norm(value))
            dark = 0.299 * red + 0.587 * green + 0.114 * blue < 0.55
            ink = "white" if dark else "black"
            axes.text(j, i, form.format(value), ha="center", va="center", color=ink, fontsize=9)


def _short(text: str, most: int) -> str:
    return text if len(text) <= most else text[: most - 1] + "…"


def slug(text: str) -> str:
    """Returns a text as part of an HTML id."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-") or "x"


def curves(content: Content, prefix: str = "", most: int = 12) -> list[Drawing]:
    """Returns the training loss of each domain, row by row."""
    drawn_rows = [(name, found) for name, found in content["curves"].items() if any(len(p) > 1 for p in found.values())]
    drawings = []
    for name, found in drawn_rows[:most]:
        domains = [d for d in (*content["domains"], *(d for d in found if d not in content["domains"])) if d in found]
        domains = [domain for domain in domains if domain != "all"] or domains
        identity = f"{prefix}curve-{slug(name)}"
        with svg.style():
            figure = svg.figure(6.4, 3.4)
            axes = figure.add_subplot()
            for number, domain in enumerate(domains):
                steps, losses = zip(*found[domain], strict=True)
                dash = ("-", "--", ":", "-.")[number // len(svg.SERIES) % 4]
                colour = svg.SERIES[number % len(svg.SERIES)]
                axes.plot(steps, losses, dash, color=colour, label=_short(domain, 18), marker="o", markersize=3)
            axes.set_xlabel("step")
            axes.set_ylabel("training loss (nats a token)")
            axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), fontsize=9)
            text = svg.as_svg(figure, identity)
        ends = [(domain, found[domain][0][1], found[domain][-1][1]) for domain in domains]
        rows = tuple((Cell(d), Cell(f"{first:.3f}"), Cell(f"{last:.3f}")) for d, first, last in ends)
        caption = (
            f"Loss of each domain's answers while {name} was trained (first seed); single: a model for each domain."
        )
        table = Table("", "", ("domain", "first", "last"), rows)
        drawings.append(Drawing(identity, f"Loss by domain: {name}", caption, text, table))
    return drawings


def expert_use(content: Content, prefix: str = "") -> list[Drawing]:
    """Returns, for each routed row, how the experts of each layer share each domain's tokens."""
    return [_use(name, found, prefix) for name, found in content["expert_use"].items()]


def _use(name: str, found: Mapping[str, Any], prefix: str) -> Drawing:
    domains, experts, layers = list(found["by_domain"]), found["experts"], found["layers"]
    columns = min(4, len(domains))
    rows = -(-len(domains) // columns)
    identity = f"{prefix}use-{slug(name)}"
    with svg.style():
        figure = svg.figure(2.1 * columns + 0.6, 2.6 * rows + 0.5)
        panels = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
        for panel in panels.flat:
            panel.set_visible(False)
        image: Any = None
        for panel, domain in zip(panels.flat, domains, strict=False):
            panel.set_visible(True)
            shares = found["by_domain"][domain]
            grid = np.full((len(layers), len(experts)), np.nan)
            for i, layer in enumerate(shares):
                grid[i, : len(layer)] = layer
            image = panel.imshow(grid, cmap="cividis", vmin=0, vmax=1, aspect="auto", interpolation="nearest")
            panel.set_title(_short(domain, 18))
            named = [_short(str(expert), 9) for expert in experts]
            panel.set_xticks(range(len(experts)), named, rotation=60, ha="right", fontsize=8)
            step = max(1, len(layers) // 6)
            panel.set_yticks(range(0, len(layers), step), [_short(str(x), 16) for x in layers[::step]], fontsize=8)
            panel.spines[:].set_visible(False)
        figure.colorbar(image, ax=panels, shrink=0.6, label="share of the gate weight")
        text = svg.as_svg(figure, identity)
    mean = {d: _mean_share(found["by_domain"][d], len(experts)) for d in domains}
    told = tuple((Cell(d), *(Cell(f"{100 * share:.0f} %") for share in mean[d])) for d in domains)
    apart = _apart(list(mean.values()))
    caption = (
        f"Share of the gate weight that each expert (columns) has in each layer (rows, first layer on top), for each "
        f"domain's held-out examples. Between domains the mean shares differ by {100 * apart:.0f} points at most."
    )
    table = Table("", "Means over layers.", ("domain", *map(str, experts)), told)
    return Drawing(identity, f"Which experts work: {name}", caption, text, table)


def _mean_share(layers: Sequence[Sequence[float]], experts: int) -> list[float]:
    padded = [[*layer, *[0.0] * (experts - len(layer))] for layer in layers]
    return [sum(column) / len(padded) for column in zip(*padded, strict=True)]


def _apart(shares: Sequence[Sequence[float]]) -> float:
    """Returns the largest difference of one expert's share between two domains."""
    return max((max(column) - min(column) for column in zip(*shares, strict=True)), default=0.0)


def similarity(content: Content, prefix: str = "") -> list[Drawing]:
    """Returns how alike the experts of each row are: B·A, and A and B by themselves."""
    drawings = []
    for name, found in content["similarity"].items():
        named = (("B·A", "BA"), ("A", "A"), ("B", "B"))
        parts = [(title, found[key]) for title, key in named if found[key] is not None]
        experts = [str(expert) for expert in found["experts"]]
        identity = f"{prefix}similar-{slug(name)}"
        with svg.style():
            figure = svg.figure(1.2 + 2.5 * len(parts), 3.1)
            panels = figure.subplots(1, len(parts), squeeze=False)[0]
            for panel, (title, values) in zip(panels, parts, strict=True):
                rows = experts if panel is panels[0] else [""] * len(experts)
                heat(panel, values, rows, experts, "PuOr", -1, 1, None)
                panel.set_title(title)
            figure.colorbar(panels[0].images[0], ax=list(panels), shrink=0.7, label="cosine")
            text = svg.as_svg(figure, identity)
        off = {title: _off_diagonal(values) for title, values in parts}
        said = ", ".join(f"{title} {value:+.2f}" for title, value in off.items())
        shared = [key for key in ("A", "B") if found[key] is None]
        note = f" {' and '.join(shared)} is one matrix for all experts." if shared else ""
        caption = f"Cosine between experts, mean over modules; mean between different experts: {said}.{note}"
        told = tuple((Cell(title), Cell(f"{value:+.3f}")) for title, value in off.items())
        table = Table("", "", ("matrix", "mean cosine between different experts"), told)
        drawings.append(Drawing(identity, f"How alike the experts are: {name}", caption, text, table))
    return drawings


def _off_diagonal(values: Sequence[Sequence[float]]) -> float:
    count = len(values)
    off = [values[i][j] for i in range(count) for j in range(count) if i != j]
    return sum(off) / len(off)


def cost_and_quality(content: Content, prefix: str = "") -> Drawing | None:
    """Returns quality over trained parameters and over training time, a point for each row."""
    metric = next(iter(content["metrics"]), None)
    rows = [
        (name_of(row), row["cost"], row["scores"][metric]["average"]["mean"])
        for row in content["rows"]
        if metric in row["scores"]
        and row["scores"][metric]["average"] is not None
        and row["routing"] is None
        and row["cost"].get("trained_parameters")
    ]
    if metric is None or len(rows) < 2:
        return None
    title = content["metrics"][metric]["title"]
    identity = f"{prefix}cost"
    with svg.style():
        figure = svg.figure(7.6, 3.8)
        left, right = figure.subplots(1, 2, sharey=True)
        for axes, key, label in (
            (left, "trained_parameters", "trained parameters of a model"),
            (right, "train_seconds", "training time, s (this machine)"),
        ):
            for number, (name, cost, value) in enumerate(rows):
                marker, colour = _MARKERS[number // len(svg.SERIES) % 5], svg.SERIES[number % len(svg.SERIES)]
                axes.scatter(cost[key], value, color=colour, marker=marker, s=36, zorder=2, label=_short(name, 24))
            axes.set_xlabel(label)
            axes.grid(alpha=0.2)
        left.set_xscale("log")
        left.set_ylabel(f"{title}, mean over domains")
        right.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), fontsize=8)
        text = svg.as_svg(figure, identity)
    told = []
    for name, one, value in rows:
        numbers = (name, f"{one['trained_parameters']:,}", f"{one['train_seconds']:,.0f}", f"{value:.3f}")
        told.append(tuple(Cell(text) for text in numbers))
    table = Table("", "", ("", "trained parameters", "seconds", title), tuple(told))
    caption = f"{title} beside what it cost. Time is this machine's, all stages of one seed."
    return Drawing(identity, "Cost beside quality", caption, text, table)
