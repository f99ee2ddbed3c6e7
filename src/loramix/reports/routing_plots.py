"""Figures of what routers did: confusion, calibration, accuracy by layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from matplotlib.ticker import MaxNLocator

from loramix.reports import svg
from loramix.reports.drawing import Drawing, heat, identity
from loramix.reports.reading import Content
from loramix.reports.tables import Cell, Table, names, pooled


def routing(content: Content, prefix: str = "") -> list[Drawing]:
    """Returns, for each row whose routers settle sequences: confusion, calibration and accuracy by layer."""
    drawings: list[Drawing | None] = []
    named = names(content)
    for row, found in content["routing"].items():
        name = named.get(row, row)
        drawings += [_confusion(name, found, prefix, pooled(content, row)), _by_layer(name, found, prefix)]
        if (found.get("calibration") or {}).get("bins"):
            drawings.append(_calibration(name, found["calibration"], prefix))
    return [drawing for drawing in drawings if drawing is not None]


def _confusion(name: str, found: Mapping[str, Any], prefix: str, seeds: str) -> Drawing | None:
    decision = next((d for d in (found["decision"], "last") if found["decisions"].get(d, {}).get("confusion")), None)
    if decision is None:
        return None
    counts = found["decisions"][decision]["confusion"]
    domains = list(found["decisions"][decision]["by_domain"])
    key = identity("confusion", name, prefix)
    with svg.style():
        figure = svg.figure(2.0 + 0.62 * len(domains), 1.4 + 0.42 * len(domains))
        axes = figure.add_subplot()
        shares = [[cell / max(sum(row), 1) for cell in row] for row in counts]
        texts = [[str(count) if count else "" for count in row] for row in counts]
        heat(axes, shares, domains, domains, svg.SHARES, 0, 1, texts)
        axes.set_xlabel("sent to")
        axes.set_ylabel("label")
        text = svg.as_svg(figure, key)
    astray = sum(sum(row) for row in counts) - sum(counts[i][i] for i in range(len(counts)))
    total = sum(sum(row) for row in counts)
    rows = tuple((Cell(d), *(Cell(str(c)) for c in row)) for d, row in zip(domains, counts, strict=True))
    caption = f"Where {total} held-out prompts{seeds} were sent (decision: {decision}): {astray} to another's expert."
    table = Table("", "", ("label", *domains), rows)
    return Drawing(key, f"Confusion of the routers: {name}", caption, text, table)


def _by_layer(name: str, found: Mapping[str, Any], prefix: str) -> Drawing | None:
    values = list(found["by_layer"].values())
    if len(values) < 2:
        return None
    key = identity("layers", name, prefix)
    with svg.style():
        figure = svg.figure(6.4, 2.8)
        axes = figure.add_subplot()
        axes.plot(range(len(values)), [100 * v for v in values], color=svg.SERIES[0], marker="o", markersize=3)
        axes.set_xlabel("layer")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_ylabel("right, %")
        axes.set_ylim(0, 104)
        axes.grid(alpha=0.2)
        text = svg.as_svg(figure, key)
    best = max(range(len(values)), key=values.__getitem__)
    caption = (
        f"How often the router of each layer names the label: {100 * values[0]:.1f} % in the first, "
        f"{100 * values[-1]:.1f} % in the last, most in layer {best} with {100 * values[best]:.1f} %."
    )
    rows = tuple((Cell(layer), Cell(f"{100 * v:.1f} %")) for layer, v in found["by_layer"].items())
    return Drawing(key, f"Routers by layer: {name}", caption, text, Table("", "", ("layer", "right"), rows))


def _calibration(name: str, found: Mapping[str, Any], prefix: str) -> Drawing:
    key = identity("calibration", name, prefix)
    bins = found["bins"]
    with svg.style():
        figure = svg.figure(4.2, 3.6)
        axes = figure.add_subplot()
        axes.plot([0, 1], [0, 1], color=svg.INK, alpha=0.4, linestyle="--", linewidth=1)
        sizes = [20 + 160 * b["count"] / sum(x["count"] for x in bins) for b in bins]
        sure, right = [b["confidence"] for b in bins], [b["accuracy"] for b in bins]
        axes.scatter(sure, right, s=sizes, color=svg.SERIES[0], zorder=2)
        axes.set_xlim(0, 1.03)
        axes.set_ylim(0, 1.03)
        axes.set_xlabel("probability the last router gave")
        axes.set_ylabel("share that was right")
        text = svg.as_svg(figure, key)
    caption = (
        "How far a router's probability can be believed: on the dashed line it is right as often as it says; larger "
        f"points are more prompts. Expected calibration error {100 * found['ece']:.1f} points."
    )
    rows = []
    for b in bins:
        numbers = (
            f"{b['low']:.1f} to {b['high']:.1f}",
            str(b["count"]),
            f"{b['confidence']:.3f}",
            f"{b['accuracy']:.3f}",
        )
        rows.append(tuple(Cell(text) for text in numbers))
    heads = ("probability", "prompts", "mean probability", "right")
    return Drawing(key, f"Calibration of the routers: {name}", caption, text, Table("", "", heads, tuple(rows)))
