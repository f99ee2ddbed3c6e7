"""Abstention in a report: who keeps an expert, who goes to the base, and how both spread over the scores."""

from __future__ import annotations

from itertools import pairwise

from loramix.reports import svg
from loramix.reports.drawing import Drawing, identity
from loramix.reports.reading import Content
from loramix.reports.tables import NONE, Cell, Table

AGAINST = {
    "unseen": "AUROC is the chance that a prompt of an unseen domain scores higher than a held-out one of the learned.",
    "left out": (
        "No domain was held back from training, so this is an estimate: each domain in turn is left out of the means, "
        "the spread and the threshold, though the model's experts and routers have learned it (the score itself looks "
        "at the frozen base's states alone). AUROC is the chance that one of its prompts scores higher than a held-out "
        "one of the others."
    ),
    "nothing": "With two domains none can be left out, and the run has no unseen ones: AUROC is not known.",
}


def table(content: Content) -> list[Table]:
    """Returns what a calibrated run keeps and leaves to the base; nothing for others."""
    found = content.get("abstention")
    if not found:
        return []
    domains = list(dict.fromkeys([*found["held"], *found["outside"]]))
    rows = []
    for domain in domains:
        held, outside = found["held"].get(domain), found["outside"].get(domain)
        cells = [domain, NONE, NONE, NONE]
        if held is not None:
            cells[1] = f"{100 * held['kept']:.1f} % of {held['prompts']}"
        if outside is not None:
            cells[2] = f"{100 * outside['abstained']:.1f} % of {outside['prompts']}"
            cells[3] = f"{outside['auroc']:.3f}"
        rows.append(tuple(Cell(text) for text in cells))
    if found["mean_auroc"] is not None:
        mean = ("mean", NONE, f"{100 * found['mean_abstained']:.1f} %", f"{found['mean_auroc']:.3f}")
        rows.append(tuple(Cell(text) for text in mean))
    note = (
        "Prompts that are unlike all domains are answered by the base alone; the threshold was set to keep "
        f"{100 * found['keep']:.0f} % of these held-out prompts (router of {found['layer']}). "
        f"{AGAINST[found['against']]}"
    )
    heads = ("domain", "keep their expert", "go to the base without one", "AUROC")
    return [Table("When no expert fits", note, heads, tuple(rows))]


def drawings(content: Content, prefix: str = "") -> list[Drawing]:
    """Returns how prompts with and without expert spread over the scores; nothing where neither is known."""
    found = content.get("abstention")
    if not found or not found["histogram"]:
        return []
    edges, key = found["histogram"]["edges"], identity("abstention", found["layer"], prefix)
    kinds = {"inside": ("with an expert", "o", "-"), "outside": ("without one", "s", "--")}
    threshold = found["threshold"]
    told = found["against"] == "unseen" and edges[0] <= threshold <= edges[-1]
    with svg.style():
        figure = svg.figure(6.4, 3.0)
        axes = figure.add_subplot()
        for number, (kind, (label, _, line)) in enumerate(kinds.items()):
            shares = [100 * share for share in found["histogram"][kind]]
            colour = svg.SERIES[number]
            axes.stairs(shares, edges, color=colour, linestyle=line, linewidth=1.6, label=label)
            axes.stairs(shares, edges, color=colour, alpha=0.15, fill=True)
        if told:
            axes.axvline(threshold, color=svg.INK, alpha=0.6, linestyle=":", label="threshold")
        axes.set_xlabel("score: how far from all domains (the last bin holds all beyond)")
        axes.set_ylabel("prompts, %")
        axes.set_ylim(bottom=0)
        axes.legend()
        text = svg.as_svg(figure, key)
    what = "prompts of unseen domains" if found["against"] == "unseen" else "prompts of each domain left out in turn"
    caption = (
        f"How far {what} are from all domains (without one), beside held-out prompts that have an expert. The less the "
        f"two overlap, the better the base's prompts are told; mean AUROC {found['mean_auroc']:.3f}."
    )
    rows = tuple(
        (Cell(f"{low:.2f} to {high:.2f}"), *(Cell(f"{100 * found['histogram'][k][i]:.1f} %") for k in kinds))
        for i, (low, high) in enumerate(pairwise(edges))
    )
    told_as = Table("", "", ("score", *(label for label, _, _ in kinds.values())), rows)
    return [Drawing(key, "When no expert fits: scores", caption, text, told_as)]
