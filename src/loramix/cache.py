"""The cache folder: things made once, safe against two processes at once and a half-written result."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock

from loramix.errors import LoramixError

_COMPLETE = "COMPLETE.json"


def cache_dir() -> Path:
    """Returns the folder for downloads and conversions: $LORAMIX_CACHE, else $XDG_CACHE_HOME/loramix, else
    ~/.cache/loramix."""
    if chosen := os.environ.get("LORAMIX_CACHE"):
        return Path(chosen).expanduser()
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home).expanduser() if home else Path.home() / ".cache") / "loramix"


def is_complete(folder: Path) -> bool:
    """Whether `build_once` finished this folder and every file still has the size it had then."""
    try:
        sizes = json.loads((folder / _COMPLETE).read_text())
        return all((folder / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError):
        return False


def build_once(folder: Path, build: Callable[[Path], None]) -> Path:
    """Returns `folder`, built by `build` if it is not there or not whole.

    The work is done in a temporary folder beside it and moved into place at the end; a lock makes a second process wait
    for the first and take its result.

    Args:
        folder: where the result lies.
        build: fills the empty folder it is given.

    Raises:
        LoramixError: the cache folder cannot be written.
        Whatever `build` raises; nothing is left then.
    """
    if is_complete(folder):
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder.parent):
            pass
    except OSError as error:
        raise LoramixError(
            f"the cache folder {folder.parent} cannot be written ({error.strerror}). Set LORAMIX_CACHE to a folder "
            "that can be written."
        ) from error
    with FileLock(folder.with_suffix(folder.suffix + ".lock")):
        if is_complete(folder):
            return folder
        making = Path(tempfile.mkdtemp(prefix=folder.name + ".making-", dir=folder.parent))
        try:
            build(making)
            sizes = {str(f.relative_to(making)): f.stat().st_size for f in sorted(making.rglob("*")) if f.is_file()}
            (making / _COMPLETE).write_text(json.dumps(sizes, indent=1))
            if folder.exists():
                shutil.rmtree(folder)
            os.replace(making, folder)
        finally:
            shutil.rmtree(making, ignore_errors=True)
    return folder
