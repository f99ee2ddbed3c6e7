"""The checkpoints of one stage: written beside each other, the newest whole one found again, old ones let go."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from loramix.checkpoints.manifest import Damaged, flush, seal, verified
from loramix.errors import StorageError

_NAME = re.compile(r"step-(\d{8})")
_MAKING = ".making"
SPARE = 2
"""Times the last checkpoint's size that must be free before the next is begun."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose every byte was checked.

    Attributes:
        folder: where it lies.
        step: after which it was written.
        about: what its writer said of it.
    """

    folder: Path
    step: int
    about: Mapping[str, Any]


class CheckpointStore:
    """A folder of checkpoints, one writer at a time (the run's lock sees to it).

    Args:
        folder: is made by `begin`, and not again: if it is gone, somebody has removed the run.
        keep: how many stay; the older are removed after a newer is whole.
    """

    def __init__(self, folder: Path, *, keep: int = 2) -> None:
        self.folder, self.keep = folder, keep

    def begin(self) -> None:
        """Makes the folder."""
        self.folder.mkdir(parents=True, exist_ok=True)

    def write(self, step: int, about: Mapping[str, Any], fill: Callable[[Path], None]) -> Path:
        """Writes a checkpoint: into a folder of another name, to disk, its manifest last, then renamed; then old ones
        go. Whatever happens on the way, those before it stay as they are.

        Args:
            step: after which it is.
            about: kept in its manifest; JSON.
            fill: writes its files into the folder given.

        Raises:
            StorageError: no room, or the folder cannot be written.
        """
        making = self.folder / f"{_name(step)}{_MAKING}"
        try:
            self._sweep()
            self._check_room()
            making.mkdir(mode=0o700)
            fill(making)
            seal(making, {**about, "step": step})
            done = self.folder / _name(step)
            if os.path.lexists(done):  # one that was damaged: the training came by again
                _remove(done)
            making.rename(done)
            flush(self.folder)
        except (OSError, SafetensorError) as error:
            shutil.rmtree(making, ignore_errors=True)
            why = getattr(error, "strerror", None) or error
            raise StorageError(
                f"{self.folder}: no checkpoint can be written after step {step} ({why}). Earlier "
                "ones are as they were. Make room or mend the folder, then go on with --resume."
            ) from error
        for old in self._steps()[: -self.keep]:
            with suppress(OSError):
                _remove(self.folder / _name(old))
        return done

    def newest(self, fits: Callable[[Mapping[str, Any]], str | None]) -> tuple[Checkpoint | None, list[str]]:
        """Returns the newest checkpoint that is whole, and what is wrong with newer ones, in one line each.

        Args:
            fits: is given what a checkpoint says of itself and returns why it does not belong here, or None.
        """
        wrong = []
        for step in reversed(self._steps()):
            folder = self.folder / _name(step)
            try:
                about = verified(folder)
            except Damaged as error:
                wrong.append(f"{folder}: {error}")
                continue
            why = f"it was written after step {about['step']}" if about["step"] != step else fits(about)
            if why is None:
                return Checkpoint(folder, step, about), wrong
            wrong.append(f"{folder}: {why}")
        return None, wrong

    def clear(self) -> None:
        """Removes all of them."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _steps(self) -> list[int]:
        if not self.folder.is_dir() or self.folder.is_symlink():
            return []
        found = (_NAME.fullmatch(one.name) for one in self.folder.iterdir())
        return sorted(int(one[1]) for one in found if one is not None)

    def _sweep(self) -> None:
        """Removes what writers left that were killed."""
        for one in self.folder.iterdir():
            if one.name.endswith(_MAKING):
                _remove(one)

    def _check_room(self) -> None:
        steps = self._steps()
        if not steps:
            return
        last = sum(file.stat().st_size for file in (self.folder / _name(steps[-1])).glob("*"))
        free = shutil.disk_usage(self.folder).free
        if free < SPARE * last:
            raise OSError(f"{free / 1e6:.0f} MB are free, and {SPARE * last / 1e6:.0f} MB are wanted")


def _remove(path: Path) -> None:
    """Removes what lies at a checkpoint's place, whatever it is; of a link, not what it leads to."""
    if path.is_symlink() or not path.is_dir():
        path.unlink()
    else:
        shutil.rmtree(path)


def _name(step: int) -> str:
    return f"step-{step:08d}"
