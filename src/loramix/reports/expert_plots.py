"""Figures of experts: which of them work on what, and how alike they are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from loramix.reports import svg
from loramix.reports.drawing import Drawing, heat, identity
from loramix.reports.reading import Content
from loramix.reports.tables import Cell, Table, names

_MOST_ROWS = 40
"""Rows of a figure beyond which one could not be told from the next."""


def expert_use(content: Content, prefix: str = "") -> list[Drawing]:
    """Returns, for each routed row, how the experts of each layer share each domain's tokens."""
    named = names(content)
    return [_use(named.get(row, row), found, prefix) for row, found in content["expert_use"].items()]


def _use(row: str, found: Mapping[str, Any], prefix: str) -> Drawing:
    domains, experts = list(found["by_domain"]), [str(one) for one in found["experts"]]
    layers, use = _rows(found)
    columns = min(4, len(domains))
    lines = -(-len(domains) // columns)
    name = identity("use", row, prefix)
    # The same colours in all panels, and none left unused where no expert has much.
    most = max((share for shares in use.values() for layer in shares for share in layer), default=1.0)
    with svg.style():
        figure = svg.figure(2.1 * columns + 0.6, 2.4 * lines + 0.5)
        panels = figure.subplots(lines, columns, squeeze=False, sharex=True, sharey=True)
        for panel in panels.flat[len(domains) :]:
            panel.set_visible(False)
        for panel, domain in zip(panels.flat, domains, strict=False):
            grid = np.full((len(layers), len(experts)), np.nan)
            for i, layer in enumerate(use[domain]):
                grid[i, : len(layer)] = layer
            image = panel.imshow(grid, cmap=svg.SHARES, vmin=0, vmax=most, aspect="auto", interpolation="none")
            panel.set_title(svg.label(domain, 18))
            named = [svg.label(expert, 12) for expert in experts]
            turned = {"rotation": 60, "ha": "right", "rotation_mode": "anchor"} if max(map(len, named)) > 2 else {}
            panel.set_xticks(range(len(experts)), named, fontsize=8, **turned)
            step = max(1, len(layers) // 6)
            panel.set_yticks(range(0, len(layers), step), [_ends(name) for name in layers[::step]], fontsize=8)
            panel.spines[:].set_visible(False)
            panel.tick_params(length=0)
        figure.colorbar(image, ax=panels, shrink=0.6, label="share of the gate weight").outline.set_visible(False)
        text = svg.as_svg(figure, name)
    mean = {domain: _mean_share(found["by_domain"][domain], len(experts)) for domain in domains}
    told = tuple((Cell(d), *(Cell(f"{100 * share:.0f} %") for share in mean[d])) for d in domains)
    apart = f"{100 * _apart(list(mean.values())):.0f}"
    where = "router (rows)" if len(layers) == len(found["layers"]) else "layer (rows; means over its modules)"
    caption = (
        f"Share of the gate weight that each expert (columns) has in each {where}, first layer on top, for each "
        f"domain's held-out examples. Between domains an expert's mean share differs by at most {apart} points."
    )
    note = "Means over all routers; an expert that a router lacks counts 0 there."
    table = Table("", note, ("domain", *experts), told)
    return Drawing(name, f"Which experts work: {row}", caption, text, table)


def _rows(found: Mapping[str, Any]) -> tuple[list[str], dict[str, list[list[float]]]]:
    """Returns the rows of the figure and each domain's shares in them: the routers, or if they are too many the means
    over those of each layer (the first number in a router's name)."""
    routers, use = [str(one) for one in found["layers"]], found["by_domain"]
    if len(routers) <= _MOST_ROWS:
        return routers, use
    members: dict[str, list[int]] = {}
    for number, name in enumerate(routers):
        members.setdefault(next((part for part in name.split(".") if part.isdigit()), name), []).append(number)
    widest = {layer: max(len(shares[n]) for shares in use.values() for n in there) for layer, there in members.items()}
    return list(members), {
        domain: [_mean_share([shares[n] for n in there], widest[layer]) for layer, there in members.items()]
        for domain, shares in use.items()
    }


def _ends(name: str) -> str:
    """Returns "0.q_proj" of "0.self_attn.q_proj"."""
    parts = name.split(".")
    return svg.label(".".join(dict.fromkeys((parts[0], parts[-1]))), 16)


def _mean_share(layers: Sequence[Sequence[float]], experts: int) -> list[float]:
    padded = [[*layer, *[0.0] * (experts - len(layer))] for layer in layers]
    return [sum(column) / len(padded) for column in zip(*padded, strict=True)]


def _apart(shares: Sequence[Sequence[float]]) -> float:
    """Returns the largest difference of one expert's share between two domains."""
    return max((max(column) - min(column) for column in zip(*shares, strict=True)), default=0.0)


def similarity(content: Content, prefix: str = "") -> list[Drawing]:
    """Returns how alike the experts of each row are: B·A, and A and B by themselves."""
    named = names(content)
    return [_similarity(named.get(row, row), found, prefix) for row, found in content["similarity"].items()]


def _similarity(row: str, found: Mapping[str, Any], prefix: str) -> Drawing:
    titles = (("B·A", "BA"), ("A", "A"), ("B", "B"))
    parts = [(title, found[key]) for title, key in titles if found[key] is not None]
    experts = [str(expert) for expert in found["experts"]]
    name = identity("similar", row, prefix)
    side = max(1.7, 0.3 * len(experts))
    with svg.style():
        figure = svg.figure(1.6 + (side + 0.2) * len(parts), side + 1.2)
        panels = figure.subplots(1, len(parts), squeeze=False)[0]
        for panel, (title, values) in zip(panels, parts, strict=True):
            rows = experts if panel is panels[0] else [""] * len(experts)
            heat(panel, values, rows, experts, svg.SIGNED, -1, 1, turn=60 if max(map(len, experts)) > 2 else 0)
            panel.set_title(title)
            if max(map(len, experts)) <= 2:
                panel.set_xticks(range(len(experts)), experts, ha="center")
        bar = figure.colorbar(panels[0].images[0], ax=list(panels), shrink=0.7, label="cosine")
        bar.outline.set_visible(False)
        text = svg.as_svg(figure, name)
    off = {title: _off_diagonal(values) for title, values in parts}
    said = ", ".join(f"{title} {value:+.2f}" for title, value in off.items())
    shared = [key for key in ("A", "B") if found[key] is None]
    note = f" {' and '.join(shared)} is one matrix for all experts." if shared else ""
    caption = f"Cosine between experts, mean over modules; mean between different experts: {said}.{note}"
    table = Table("", "", ("", *experts), _cosines(parts, experts))
    return Drawing(name, f"How alike the experts are: {row}", caption, text, table)


def _cosines(parts: Sequence[tuple[str, Sequence[Sequence[float]]]], experts: Sequence[str]) -> tuple[Any, ...]:
    return tuple(
        (Cell(f"{title}: {expert}"), *(Cell(f"{value:+.2f}") for value in line))
        for title, values in parts
        for expert, line in zip(experts, values, strict=True)
    )


def _off_diagonal(values: Sequence[Sequence[float]]) -> float:
    count = len(values)
    off = [values[i][j] for i in range(count) for j in range(count) if i != j]
    return sum(off) / len(off)
