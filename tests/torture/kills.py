"""SIGKILL at random instants, many of them inside a save: each run goes on and ends with the same bits.

    python -m tests.torture.kills [--kills 200] [--inside 80] [--method moa]

Each victim is a fork of this process, which has imported everything, so that a kill costs seconds. Kills inside a save
are made by the victim itself, at a random one of the calls that touch the disk while a checkpoint is written; the
others come from outside after a random time. A victim that was killed goes on, and may be killed again, until it ends;
then all it left is compared with what an uninterrupted run left.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from loramix.checkpoints import store
from loramix.cli.output import quiet_libraries
from tests import ended
from tests.torture.forks import fork

TOUCHES = ((os, "fsync"), (os, "open"), (Path, "mkdir"), (Path, "rename"), (Path, "write_bytes"), (Path, "write_text"))
"""Calls while a checkpoint is written; before each, a victim may end."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--inside", type=int, default=80, help="how many of them inside a save")
    parser.add_argument("--method", default="moa")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    quiet_libraries()
    with tempfile.TemporaryDirectory() as scratch:
        found = torture(Path(scratch), args.kills, args.inside, args.method, args.seed)
    print(json.dumps(found))
    return int(found["equal"] != found["runs"] or found["failed"] > 0)


def torture(place: Path, kills: int, inside: int, method: str, seed: int) -> dict[str, Any]:
    """Returns how many kills there were, where, and how many of the runs that were killed ended equal."""
    torch.set_num_threads(1)
    draw = random.Random(seed)
    content = ended.settings(place, method, save_steps=1)
    content["controls"] = []
    started = time.monotonic()
    code = fork(lambda: ended.train(content, place / "whole"))[1]()
    seconds = time.monotonic() - started
    assert code == 0, "the uninterrupted run failed"
    expected = ended.left_by(place / "whole")
    touches = _touches(content, place)
    wanted = ["inside"] * inside + ["outside"] * (kills - inside)
    draw.shuffle(wanted)
    done = {"inside": 0, "outside": 0}
    runs = equal = failed = 0
    while sum(done.values()) < kills:
        folder = place / f"run-{runs}"
        runs += 1
        while True:
            where = wanted[min(sum(done.values()), kills - 1)]
            last = sum(done.values()) >= kills
            number = draw.randrange(1, touches)
            victim: Callable[[], object] = lambda f=folder: ended.train(content, f, resume=True)  # noqa: E731
            if where == "inside" and not last:
                victim = lambda f=folder, n=number: _ends_itself(content, f, n)  # noqa: E731
            process, wait = fork(victim)
            if where == "outside" and not last:
                time.sleep(draw.uniform(0.05, 0.9 * seconds))
                os.kill(process, signal.SIGKILL)
            code = wait()
            if code == -signal.SIGKILL:
                done[where] += 1
                continue
            failed += code != 0
            break
        left = ended.left_by(folder) if code == 0 else {}
        equal += left == expected
        for name in sorted(expected.keys() | left.keys()):
            if left.get(name) != expected.get(name):
                print(f"{folder.name}: {name} is not what it would have been", file=sys.stderr)
        shutil.rmtree(folder, ignore_errors=True)
        print(f"{sum(done.values())} kills, {runs} runs, {equal} equal", file=sys.stderr, flush=True)
    return {"kills": sum(done.values()), **done, "runs": runs, "equal": equal, "failed": failed, "method": method}


def _touches(content: dict[str, Any], place: Path) -> int:
    """Returns how often a whole run touches the disk inside saves."""
    told = place / "touches"

    def count() -> None:
        with _Watched(lambda number: told.write_bytes(str(number).encode())):
            ended.train(content, place / "counted")

    assert fork(count)[1]() == 0
    return int(told.read_text())


def _ends_itself(content: dict[str, Any], folder: Path, number: int) -> None:
    def end(call: int) -> None:
        if call == number:
            os.kill(os.getpid(), signal.SIGKILL)

    with _Watched(end):
        ended.train(content, folder, resume=True)


class _Watched:
    """Calls something before each call in TOUCHES that comes from inside a save."""

    def __init__(self, before: Callable[[int], object]) -> None:
        self._before, self._inside, self._count = before, False, 0
        self._true = [(owner, name, getattr(owner, name)) for owner, name in TOUCHES]

    def __enter__(self) -> None:
        write = store.CheckpointStore.write

        def inside(keeper: Any, *args: Any) -> Any:
            self._inside = True
            try:
                return write(keeper, *args)
            finally:
                self._inside = False

        store.CheckpointStore.write = inside  # type: ignore[method-assign]
        for owner, name, true in self._true:
            setattr(owner, name, self._before_each(true))

    def __exit__(self, *_: object) -> None:
        """The process ends with it."""

    def _before_each(self, true: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if self._inside:
                self._count += 1
                self._inside = False  # what is done about it is no save
                self._before(self._count)
                self._inside = True
            return true(*args, **kwargs)

        return call


if __name__ == "__main__":
    raise SystemExit(main())
