"""What a user sees while a comparison runs: how many cells are done and when the rest will be."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn

from loramix.comparison.launch import Outcome
from loramix.comparison.plan import Cell


class CellProgress:
    """One bar on a terminal, a line for each finished cell elsewhere, both with the time left.

    The time left is what the work done since the start took, scaled to the work left; so it is a guess until cells of
    several methods are done.
    """

    def __init__(self, cells: Mapping[str, Cell], done: Sequence[str], console: Console, started: float) -> None:
        self.cells, self.console, self.started = cells, console, started
        self.total = len(cells)
        self.finished = len(done)
        self.left = sum(cell.work for name, cell in cells.items() if name not in done)
        self.worked = 0
        self.bar: Progress | None = None
        self.task = TaskID(0)

    def __enter__(self) -> CellProgress:
        words = f"{self.total} cells" + (f", {self.finished} of them finished before" if self.finished else "")
        self.console.print(words, highlight=False)
        if self.console.is_terminal:
            self.bar = Progress(
                TextColumn("cells"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[about]}"),
                console=self.console,
                transient=True,
            )
            self.bar.start()
            self.task = self.bar.add_task("cells", total=self.total, completed=self.finished, about="")
        return self

    def show(self, outcome: Outcome) -> None:
        """Counts a cell that ended and says so."""
        work = self.cells[outcome.cell].work
        self.finished += outcome.problem is None
        self.worked, self.left = self.worked + work, self.left - work
        elapsed = time.monotonic() - self.started
        about = f"about {_duration(elapsed / max(self.worked, 1) * self.left)} left" if self.left > 0 else "done"
        said = "finished" if outcome.problem is None else f"FAILED: {outcome.problem}"
        line = f"[{self.finished}/{self.total}] {outcome.cell} {said} after {_duration(elapsed)}; {about}"
        if self.bar is not None:
            self.bar.update(self.task, completed=self.finished, about=about)
        if self.bar is None or outcome.problem is not None:
            self.console.print(line, highlight=False, markup=False, soft_wrap=True)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.bar is not None:
            self.bar.stop()


def _duration(seconds: float) -> str:
    minutes, left = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {left:02d} s" if minutes else f"{left} s"
