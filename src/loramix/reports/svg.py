"""A matplotlib figure as SVG that stands in a page: no outside request, the page's own font and colour, same bytes for
the same figure."""

from __future__ import annotations

import io
import re
import unicodedata
import warnings
from typing import Any

from matplotlib import rc_context
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure

INK = "#010203"
"""Drawn colour of text and axes; becomes the page's own, so that it reads on light and dark."""
STYLE: dict[str, Any] = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 10,
    # A dollar sign in a domain's name is no formula.
    "text.parse_math": False,
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
SERIES = ("#4477aa", "#d9485f", "#2a8f4d", "#a87f00", "#1b8fae", "#aa4499", "#8a8a2e", "#e06c1f", "#009988", "#7d7f88")
"""After Paul Tol's bright colours, the pale ones darker: contrast of 3 to 1 or more on the page, light or dark."""

# From hardly there to full colour, not from white: the page shines through, and small values recede on light and on
# dark. Orange and purple are told apart by colour-blind readers (as in ColorBrewer's PuOr).
SHARES = LinearSegmentedColormap.from_list("shares", [(0.25, 0.56, 0.87, 0.06), (0.25, 0.56, 0.87, 1.0)])
SIGNED = LinearSegmentedColormap.from_list(
    "signed",
    [
        (0.0, (0.58, 0.51, 0.88, 1.0)),
        (0.4999, (0.58, 0.51, 0.88, 0.05)),
        (0.5001, (0.94, 0.61, 0.20, 0.05)),
        (1.0, (0.94, 0.61, 0.20, 1.0)),
    ],
)
PIXELS_AN_INCH = 110
"""At its full size a figure's text of 10 points is as large as the page's own."""


def figure(width: float, height: float) -> Figure:
    """Returns an empty figure, sizes in inches."""
    return Figure(figsize=(width, height), layout="constrained")


def style() -> Any:
    """Returns the context in which figures are drawn."""
    return rc_context(STYLE)


def label(text: str, most: int) -> str:
    """Returns a name as it can be drawn: one line, no more than `most` columns (a Chinese character takes two)."""
    flat = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    kept, width = "", 0
    for character in flat:
        width += 2 if unicodedata.east_asian_width(character) in "WF" else 1
        if width > most:
            kept = kept[:-1] + "…"
            break
        kept += character
    # matplotlib leaves names that begin with "_" out of its legends.
    return f"\u200b{kept}" if kept.startswith("_") else kept


def as_svg(drawn: Figure, name: str) -> str:
    """Returns the figure's SVG element, cut to what is drawn; its style's --w is its full width.

    Args:
        drawn: made and filled within `style()`.
        name: unique in the page; ids inside begin with it, so that figures do not share them.
    """
    out = io.StringIO()
    with rc_context({**STYLE, "svg.hashsalt": name}), warnings.catch_warnings():
        # Text stays text: the reader's font draws what matplotlib's own does not have.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        metadata = {"Date": None, "Creator": None}
        drawn.savefig(out, format="svg", metadata=metadata, transparent=True, bbox_inches="tight", pad_inches=0.04)
    text = out.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>\s*", "", text, flags=re.DOTALL)
    text = re.sub(r"<[^>]*>", lambda tag: _in_page(tag.group(), name), text)
    width = round(float(text.split('viewBox="')[1].split('"')[0].split()[2]) / 72 * PIXELS_AN_INCH)
    begin = rf'<svg viewBox="\1" style="--w: {width}px" aria-hidden="true" focusable="false">'
    return re.sub(r'<svg [^>]*?viewBox="([^"]+)"[^>]*>', begin, text, count=1)


def _in_page(tag: str, name: str) -> str:
    """Returns a tag with ids of its own and with the page's colour and font; what stands between tags stays."""
    tag = re.sub(r'\bid="', f'id="{name}-', tag)
    tag = re.sub(r'(xlink:href|href)="#', rf'\1="#{name}-', tag)
    tag = tag.replace("url(#", f"url(#{name}-").replace(INK, "currentColor")
    return re.sub(r"font: ([\d.]+)px [^;\"]*", r"font-size: \1px; font-family: inherit", tag)
