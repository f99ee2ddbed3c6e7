"""A matplotlib figure as SVG that stands in a page: no outside request, the page's own font and colour, same bytes for
the same figure."""

from __future__ import annotations

import io
import re
from typing import Any

from matplotlib import rc_context
from matplotlib.figure import Figure

INK = "#010203"
"""Drawn colour of text and axes; becomes the page's own, so that it reads on light and dark."""
STYLE: dict[str, Any] = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 10,
    "text.color": INK,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.titlesize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": INK,
    "ytick.color": INK,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
    "legend.frameon": False,
}
SERIES = ("#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377", "#999933", "#ee7733", "#009988", "#888888")
"""Paul Tol's bright colours and a few more: told apart by most colour-blind readers, on white and on black."""


def figure(width: float, height: float) -> Figure:
    """Returns an empty figure, sizes in inches."""
    return Figure(figsize=(width, height), layout="constrained")


def style() -> Any:
    """Returns the context in which figures are drawn."""
    return rc_context(STYLE)


def as_svg(drawn: Figure, name: str) -> str:
    """Returns the figure's SVG element.

    Args:
        drawn: made and filled within `style()`.
        name: unique in the page; ids inside begin with it, so that figures do not share them.
    """
    out = io.StringIO()
    with rc_context({**STYLE, "svg.hashsalt": name}):
        drawn.savefig(out, format="svg", metadata={"Date": None, "Creator": None}, transparent=True)
    text = out.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>\s*", "", text, flags=re.DOTALL)
    text = re.sub(r'\bid="', f'id="{name}-', text)
    text = re.sub(r'(xlink:href|href)="#', rf'\1="#{name}-', text)
    text = text.replace("url(#", f"url(#{name}-").replace(INK, "currentColor")
    width = round(drawn.get_figwidth() * 110)
    begin = rf'<svg viewBox="\1" style="max-width: {width}px" aria-hidden="true" focusable="false">'
    text = re.sub(r'<svg [^>]*?viewBox="([^"]+)"[^>]*>', begin, text, count=1)
    return re.sub(r"font: ([\d.]+)px [^;\"]*", r"font-size: \1px; font-family: inherit", text)
