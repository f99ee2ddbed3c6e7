"""Runs cells in the order their needs allow: here, in several processes of this machine, or on a Ray cluster.

A worker is a `CellRunner` that runs one cell at a time and keeps base and data between cells. All workers write below
the same output folder, so on a cluster it must lie where every node sees it.
"""

from __future__ import annotations

import multiprocessing
import os
import queue
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch

from loramix.comparison.plan import Cell
from loramix.comparison.runner import CellRunner
from loramix.errors import ConfigError, Interrupted, LoramixError

Launcher = Literal["local", "ray"]


@dataclass(frozen=True)
class Outcome:
    """What became of a cell: nothing to say, or why it failed."""

    cell: str
    problem: str | None = None


class Workers(Protocol):
    """Some workers, each busy with one cell or free."""

    count: int

    def start(self, worker: int, cell: Cell) -> None:
        """Gives a free worker a cell."""

    def wait(self) -> tuple[int, Outcome]:
        """Returns the next worker that is done, and what became of its cell."""

    def close(self) -> None:
        """Ends the workers."""


def run_cells(cells: Mapping[str, Cell], done: Sequence[str], workers: Workers) -> Iterator[Outcome]:
    """Runs all cells that are not done, each after the cells it needs, and yields what became of each.

    A cell that needs a failed one fails with it; all others go on.

    Args:
        cells: by name.
        done: names of finished cells.
        workers: who runs them; closed at the end, however it comes.
    """
    finished, failed = set(done), set[str]()
    waiting = {name: cell for name, cell in cells.items() if name not in finished}
    free = list(range(workers.count))
    try:
        while waiting or len(free) < workers.count:
            for name in [n for n, cell in waiting.items() if failed & set(cell.needs.values())]:
                del waiting[name]
                failed.add(name)
                yield Outcome(name, "a cell it needs failed")
            ready = [cell for cell in waiting.values() if finished >= set(cell.needs.values())]
            for cell in ready[: len(free)]:
                workers.start(free.pop(), cell)
                del waiting[cell.name]
            if len(free) < workers.count:
                worker, outcome = workers.wait()
                free.append(worker)
                (finished if outcome.problem is None else failed).add(outcome.cell)
                yield outcome
    finally:
        workers.close()


def attempt(runner: CellRunner, cell: Cell) -> Outcome:
    """Runs one cell; what goes wrong with it is its outcome, so that the others go on."""
    try:
        runner.run(cell)
    except LoramixError as error:
        return Outcome(cell.name, str(error))
    except Exception as error:
        runner.record_failure(cell, traceback.format_exc())
        return Outcome(cell.name, f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}")
    return Outcome(cell.name)


class Here:
    """One worker: this process."""

    count = 1

    def __init__(self, runner: CellRunner) -> None:
        self.runner = runner
        self._outcome: Outcome | None = None

    def start(self, worker: int, cell: Cell) -> None:
        self._outcome = attempt(self.runner, cell)

    def wait(self) -> tuple[int, Outcome]:
        assert self._outcome is not None
        return 0, self._outcome

    def close(self) -> None:
        self.runner.forget()


def _work(runner: CellRunner, threads: int | None, tasks: Any, outcomes: Any, number: int) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    if threads is not None:
        torch.set_num_threads(threads)
    while (cell := tasks.get()) is not None:
        try:
            outcomes.put((number, attempt(runner, cell)))
        except Interrupted as ended:  # Ctrl-C reaches all workers; each has saved what it was at
            sys.exit(ended.exit_code)


def _end_with_parent() -> None:
    """Ends this process soon after the one that started it: a killed comparison leaves no workers behind."""
    parent = multiprocessing.parent_process()
    while parent is not None and parent.is_alive():
        time.sleep(1)
    os._exit(1)


class Processes:
    """Several processes of this machine. The threads that one would take are dealt out among them, unless
    OMP_NUM_THREADS says how many each takes. One that dies fails its cell and is replaced."""

    def __init__(self, runner: CellRunner, count: int) -> None:
        self._context = multiprocessing.get_context("spawn")
        self.count = count
        self._runner = runner
        self._outcomes: Any = self._context.Queue()
        self._tasks: dict[int, Any] = {}
        self._processes: dict[int, Any] = {}
        self._running: dict[int, str] = {}
        for number in range(count):
            self._begin(number)

    def _begin(self, number: int) -> None:
        # Whoever set OMP_NUM_THREADS has said how many each process takes; all processes inherit it.
        threads = None if "OMP_NUM_THREADS" in os.environ else max(1, torch.get_num_threads() // self.count)
        self._tasks[number] = self._context.Queue()
        work = (self._runner, threads, self._tasks[number], self._outcomes, number)
        self._processes[number] = self._context.Process(target=_work, args=work, daemon=True)
        self._processes[number].start()

    def start(self, worker: int, cell: Cell) -> None:
        self._running[worker] = cell.name
        self._tasks[worker].put(cell)

    def wait(self) -> tuple[int, Outcome]:
        while True:
            try:
                worker, outcome = self._outcomes.get(timeout=2)
            except queue.Empty:
                died = self._died()
                if died is None:
                    continue
                worker, outcome = died
            del self._running[worker]
            return worker, outcome

    def _died(self) -> tuple[int, Outcome] | None:
        """Returns a worker that ended without a word, and what its cell is told; another takes its place."""
        for worker, cell in self._running.items():
            code = self._processes[worker].exitcode
            if code is not None:
                self._begin(worker)
                said = f"its process ended (exit code {code}; -9 is mostly too little memory: lower --jobs)"
                return worker, Outcome(cell, said)
        return None

    def close(self) -> None:
        for tasks in self._tasks.values():
            tasks.put(None)
        for process in self._processes.values():
            process.join(timeout=5)
            if process.is_alive():
                process.terminate()


class RayWorkers:
    """Actors of the Ray cluster that RAY_ADDRESS names ("auto" finds one that runs here), as many as it has places for;
    of a new local one without it.

    Raises:
        ConfigError: Ray is not installed.
    """

    def __init__(self, runner: CellRunner, count: int) -> None:
        try:
            import ray
        except ImportError as error:
            raise ConfigError('--launcher ray needs Ray: pip install "loramix[ray]".') from error
        self._ray = ray
        self._ours = not ray.is_initialized()
        if self._ours:
            if address := os.environ.get("RAY_ADDRESS"):
                ray.init(address=address, log_to_driver=False)
            else:
                cores = max(count, os.cpu_count() or 1)
                ray.init(address="local", num_cpus=cores, include_dashboard=False, log_to_driver=False)
        gpus = 1 if ray.cluster_resources().get("GPU") else 0
        # An actor that finds no place would be given a cell and never run it.
        places = ray.cluster_resources().get("GPU" if gpus else "CPU", 1)
        self.count = max(1, min(count, int(places)))
        self._runner = runner
        self._actor = ray.remote(num_cpus=1, num_gpus=gpus)(_RayWorker)
        self._actors = [self._actor.remote(runner) for _ in range(self.count)]
        self._running: dict[Any, tuple[int, str]] = {}

    def start(self, worker: int, cell: Cell) -> None:
        self._running[self._actors[worker].run.remote(cell)] = worker, cell.name

    def wait(self) -> tuple[int, Outcome]:
        ready, _ = self._ray.wait(list(self._running), num_returns=1)
        worker, cell = self._running.pop(ready[0])
        try:
            return worker, self._ray.get(ready[0])
        except self._ray.exceptions.RayError as error:
            self._actors[worker] = self._actor.remote(self._runner)  # the old one may be dead
            return worker, Outcome(cell, f"its Ray worker failed: {(str(error).splitlines() or [''])[0]}")

    def close(self) -> None:
        for actor in self._actors:
            self._ray.kill(actor)
        if self._ours:
            self._ray.shutdown()


class _RayWorker:
    def __init__(self, runner: CellRunner) -> None:
        self.runner = runner

    def run(self, cell: Cell) -> Outcome:
        return attempt(self.runner, cell)


def workers_for(launcher: Launcher, jobs: int, runner: CellRunner) -> Workers:
    """Returns the workers of a launcher.

    Args:
        launcher: "local" or "ray".
        jobs: how many cells run at the same time.
        runner: what each worker is a copy of.
    """
    if launcher == "ray":
        return RayWorkers(runner, jobs)
    return Here(runner) if jobs == 1 else Processes(runner, jobs)
