"""Figures of what came out: means with their intervals, what domains do to each other, losses, cost beside quality.

Each comes with a sentence that says what it shows and a table of what is drawn.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.ticker import EngFormatter, LogLocator, MaxNLocator, NullLocator

from loramix.reports import svg
from loramix.reports.drawing import Drawing, heat, identity
from loramix.reports.reading import Content
from loramix.reports.tables import NONE, Cell, Table, bases, competes, names

_MARKERS = ("o", "s", "^", "D", "v", "P", "X")
# Told apart by shape and by colour.
_SETTINGS = {
    "mixture": ("o", svg.SERIES[0], "one model on all domains"),
    "single": ("s", svg.SERIES[7], "a model for each domain"),
    "none": ("D", svg.SERIES[9], "untrained"),
    "told": ("|", svg.SERIES[8], "experts by label or alone"),
}


def means(content: Content, prefix: str = "") -> list[Drawing]:
    """Returns, for each metric and base, the mean over domains of every row with its interval, best on top."""
    drawn = [_means(content, metric, base, prefix) for metric in content["metrics"] for base in bases(content)]
    return [drawing for drawing in drawn if drawing is not None]


def _means(content: Content, metric: str, base: str, prefix: str) -> Drawing | None:
    about = content["metrics"][metric]
    named = names(content)
    found = [
        (named[row["id"]], "told" if row["routing"] is not None else row["setting"], row["scores"][metric]["average"])
        for row in content["rows"]
        if row["base"] == base and _average(row, metric) is not None
    ]
    if len(found) < 2 or len({value["mean"] for _, _, value in found}) < 2:
        return None
    found.sort(key=lambda one: one[2]["mean"], reverse=about["better"] == "higher")
    name = identity("means", f"{metric} {base}", prefix)
    with svg.style():
        drawn = svg.figure(5.4, 1.0 + 0.27 * len(found))
        axes = drawn.add_subplot()
        for number, (_, setting, value) in enumerate(found):
            marker, colour, _ = _SETTINGS.get(setting, _SETTINGS["mixture"])
            if value.get("low") is not None:
                axes.plot([value["low"], value["high"]], [number, number], color=colour, linewidth=2, alpha=0.55)
            axes.plot([value["mean"]], [number], marker, color=colour, markersize=7, markeredgewidth=2)
        axes.set_yticks(range(len(found)), [svg.label(one, 30) for one, _, _ in found])
        axes.invert_yaxis()
        axes.spines["left"].set_visible(False)
        axes.tick_params(axis="y", length=0)
        _spread_out(axes, [value["mean"] for _, _, value in found])
        axes.set_xlabel(f"{about['title']}, mean over domains ({about['better']} is better)")
        axes.grid(axis="x", alpha=0.2)
        for setting, (marker, colour, told) in _SETTINGS.items():
            if any(one == setting for _, one, _ in found):
                axes.plot([], [], marker, color=colour, label=told, markeredgewidth=2)
        drawn.legend(loc="outside upper left", ncols=2, fontsize=8, handletextpad=0.2, columnspacing=1.2)
        text = svg.as_svg(drawn, name)
    digits = about["digits"]
    rows = []
    for one, _, value in found:
        ends = [NONE if value.get(end) is None else f"{value[end]:.{digits}f}" for end in ("low", "high")]
        rows.append((Cell(one), Cell(f"{value['mean']:.{digits}f}"), *map(Cell, ends)))
    has_intervals = any(value.get("low") is not None for _, _, value in found)
    bars = " Bars are 95 % intervals of a bootstrap over test examples." if has_intervals else ""
    caption = f"{about['title']}, mean over domains, best on top: {found[0][0]} {found[0][2]['mean']:.{digits}f}.{bars}"
    title = f"{about['title']}: all rows" + (f", {base}" if len(bases(content)) > 1 else "")
    return Drawing(name, title, caption, text, Table("", "", ("", "mean", "from", "to"), tuple(rows)))


def _average(row: Mapping[str, Any], metric: str) -> Mapping[str, Any] | None:
    value: Mapping[str, Any] | None = (row["scores"].get(metric) or {}).get("average")
    return value if value is not None and math.isfinite(value["mean"]) else None


def _spread_out(axes: Axes, values: Sequence[float]) -> None:
    """Takes a logarithmic axis where one row would press all others together."""
    if min(values) > 0 and max(values) / min(values) > 3:
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(EngFormatter(sep=" "))


def interference(content: Content, prefix: str = "") -> list[Drawing]:
    """Returns how each mixture differs from the single LoRA of each domain: what the domains do to each other."""
    drawn = [_interference(content, metric, base, prefix) for metric in content["metrics"] for base in bases(content)]
    return [drawing for drawing in drawn if drawing is not None]


def _interference(content: Content, metric: str, base: str, prefix: str) -> Drawing | None:
    of_base = [row for row in content["rows"] if row["base"] == base and metric in row["scores"]]
    single = next((row for row in of_base if (row["label"], row["setting"]) == ("lora", "single")), None)
    rows = [row for row in of_base if row["setting"] == "mixture" and row["routing"] is None]
    alone = single["scores"][metric]["by_domain"] if single is not None else {}
    domains = [domain for domain in content["domains"] if domain in alone]
    values = [
        [_relative(row["scores"][metric]["by_domain"].get(domain), alone[domain]) for domain in domains] for row in rows
    ]
    if all(value is None for line in values for value in line):
        return None
    named = names(content)
    shown = [named[row["id"]].removesuffix(", mixed") for row in rows]
    about = content["metrics"][metric]
    down = about["better"] == "lower"
    helped = sum(v is not None and (v < 0) == down and v != 0 for line in values for v in line)
    count = sum(v is not None for line in values for v in line)
    caption = (
        f"{about['title']} of each mixture against the LoRA trained on that domain alone, in per cent. "
        f"{'Below' if down else 'Above'} 0 (purple) the mixture is better: {helped} of {count} cells."
    )
    name = identity("interference", f"{metric} {base}", prefix)
    with svg.style():
        drawn = svg.figure(2.4 + 0.85 * len(domains), 1.1 + 0.34 * len(rows))
        most = max((abs(v) for line in values for v in line if v is not None), default=0.0) or 1.0
        texts = [[_told(v, "{:+.0f}" if most >= 10 else "{:+.1f}") for v in line] for line in values]
        colours = svg.SIGNED if down else svg.SIGNED.reversed()
        heat(drawn.add_subplot(), values, shown, domains, colours, -most, most, texts)
        text = svg.as_svg(drawn, name)
    told = [(Cell(n), *(Cell(_told(v, "{:+.1f} %")) for v in line)) for n, line in zip(shown, values, strict=True)]
    title = f"{about['title']}: mixture against single" + (f", {base}" if len(bases(content)) > 1 else "")
    return Drawing(name, title, caption, text, Table("", "", ("", *domains), tuple(told)))


def _relative(value: Mapping[str, Any] | None, alone: Mapping[str, Any]) -> float | None:
    if value is None or not alone["mean"]:
        return None
    relative = 100 * (value["mean"] / alone["mean"] - 1)
    return float(relative) if math.isfinite(relative) else None


def _told(value: float | None, form: str) -> str:
    return NONE if value is None else form.format(value)


def curves(content: Content, prefix: str = "") -> list[Drawing]:
    """Returns the training loss of each domain, row by row."""
    there = [(row, found) for row, found in content["curves"].items() if any(len(p) > 1 for p in found.values())]
    return [_curve(content, row, found, prefix) for row, found in there]


def _curve(content: Content, identifier: str, found: Mapping[str, Sequence[Sequence[float]]], prefix: str) -> Drawing:
    row = names(content).get(identifier, identifier)
    domains = [d for d in (*content["domains"], *(d for d in found if d not in content["domains"])) if found.get(d)]
    domains = [domain for domain in domains if domain != "all"] or domains
    name = identity("curve", row, prefix)
    with svg.style():
        figure = svg.figure(6.4, 3.4)
        axes = figure.add_subplot()
        for number, domain in enumerate(domains):
            steps, losses = zip(*found[domain], strict=True)
            dash = ("-", "--", ":", "-.")[number // len(svg.SERIES) % 4]
            colour = svg.SERIES[number % len(svg.SERIES)]
            dot = _MARKERS[number % len(_MARKERS)] if len(steps) <= 25 else ""
            axes.plot(steps, losses, dash, color=colour, label=svg.label(domain, 18), marker=dot, markersize=3)
        axes.set_xlabel("step")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_ylabel("training loss (nats a token)")
        axes.grid(alpha=0.2)
        axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), fontsize=9)
        text = svg.as_svg(figure, name)
    ends = [(domain, found[domain][0][1], found[domain][-1][1]) for domain in domains]
    rows = tuple((Cell(d), Cell(f"{first:.3f}"), Cell(f"{last:.3f}")) for d, first, last in ends)
    fell = sum(last < first for _, first, last in ends)
    caption = (
        f"Loss of each domain's training answers while {row} was trained (first seed"
        f"{'; a model for each domain' if identifier.endswith('/single') else ''}). From the first to the last point "
        f"it fell for {fell} of {len(ends)}."
    )
    return Drawing(name, f"Loss by domain: {row}", caption, text, Table("", "", ("domain", "first", "last"), rows))


def cost_and_quality(content: Content, prefix: str = "") -> list[Drawing]:
    """Returns, for each base, quality over trained parameters, training time and memory, a point for each row."""
    metric = next(iter(content["metrics"]), None)
    drawn = [_cost(content, metric, base, prefix) for base in bases(content) if metric is not None]
    return [drawing for drawing in drawn if drawing is not None]


def _cost(content: Content, metric: str, base: str, prefix: str) -> Drawing | None:
    named = names(content)
    found = [
        (named[row["id"]], row["cost"], row["scores"][metric]["average"]["mean"])
        for row in content["rows"]
        if row["base"] == base
        and _average(row, metric) is not None
        and competes(row)
        and row["cost"].get("trained_parameters")
    ]
    if len(found) < 2:
        return None
    about = content["metrics"][metric]
    axes_of = [("trained_parameters", "trained parameters of a model"), ("train_seconds", "training, s")]
    if all(cost.get("peak_memory_mb") for _, cost, _ in found):
        axes_of.append(("peak_memory_mb", "peak memory, MB"))
    name = identity("cost", base, prefix)
    with svg.style():
        figure = svg.figure(2.2 + 2.4 * len(axes_of), 3.6)
        panels = figure.subplots(1, len(axes_of), sharey=True)
        for axes, (key, told) in zip(panels, axes_of, strict=True):
            for number, (row, cost, value) in enumerate(found):
                look = {"marker": _MARKERS[number % len(_MARKERS)], "color": svg.SERIES[number % len(svg.SERIES)]}
                axes.scatter(cost[key], value, s=40, zorder=2, label=svg.label(row, 24), **look)
            _spread_out(axes, [cost[key] for _, cost, _ in found])
            axes.set_xlabel(told)
            axes.grid(alpha=0.2)
        panels[0].set_ylabel(f"{about['title']}, mean over domains")
        panels[-1].legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), fontsize=8)
        text = svg.as_svg(figure, name)
    told_rows = []
    for row, one, value in found:
        numbers = (row, f"{one['trained_parameters']:,}", f"{one['train_seconds']:,.0f}", f"{value:.3f}")
        told_rows.append(tuple(Cell(text) for text in numbers))
    table = Table("", "", ("", "trained parameters", "seconds", about["title"]), tuple(told_rows))
    lower = about["better"] == "lower"
    caption = (
        f"{about['title']} beside what it cost: best and cheapest is {'below' if lower else 'above'} on the left. Time "
        "and memory are this machine's; time is all stages of one seed."
    )
    title = "Cost beside quality" + (f", {base}" if len(bases(content)) > 1 else "")
    return Drawing(name, title, caption, text, table)
