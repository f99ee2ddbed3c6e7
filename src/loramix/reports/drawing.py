"""A figure as it stands in the page, and the one kind of figure that several parts of it use: numbers as colours."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import Colormap

from loramix.reports import svg
from loramix.reports.tables import Table

_WIDE = 720


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

    @property
    def wide(self) -> bool:
        """Whether it wants a line of the page for itself."""
        found = re.search(r"--w: (\d+)px", self.svg)
        return found is not None and int(found.group(1)) > _WIDE


def identity(kind: str, name: str, prefix: str = "") -> str:
    """Returns an HTML id: readable, and another for every other name, whatever script the name is in."""
    words = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")[:40]
    return "-".join(filter(None, (f"{prefix}{kind}", words, hashlib.sha256(name.encode()).hexdigest()[:6])))


def heat(
    axes: Axes,
    values: Sequence[Sequence[float | None]],
    rows: Sequence[str],
    columns: Sequence[str],
    colours: Colormap,
    low: float,
    high: float,
    texts: Sequence[Sequence[str]] | None = None,
    turn: int = 35,
) -> None:
    """Draws numbers as coloured cells.

    Args:
        axes: where.
        values: a list for each row; None leaves a cell empty.
        rows, columns: their names.
        colours: `svg.SHARES` or `svg.SIGNED`.
        low, high: the values of the first and the last colour.
        texts: what is written into the cells.
        turn: degrees by which the columns' names are turned.
    """
    grid = np.array([[np.nan if v is None else v for v in row] for row in values], dtype=float)
    # Without interpolation each cell is one pixel that the reader's browser enlarges: small, and sharp at any size.
    image = axes.imshow(grid, cmap=colours, vmin=low, vmax=high, aspect="auto", interpolation="none")
    named = [svg.label(column, 16) for column in columns]
    axes.set_xticks(range(len(columns)), named, rotation=turn, ha="right", rotation_mode="anchor")
    axes.set_yticks(range(len(rows)), [svg.label(row, 28) for row in rows])
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    if texts is None:
        return
    for (i, j), value in np.ndenumerate(grid):
        if np.isfinite(value):
            full = image.cmap(image.norm(value))[3] > 0.7
            axes.text(j, i, texts[i][j], ha="center", va="center", color="black" if full else svg.INK, fontsize=9)
