"""A disk that is full, a folder that is read-only or gone while a run trains, a clock that jumps: what was kept stays,
the exit code is right, nothing is a traceback, and when it is mended the run goes on and ends as it would have.

    python -m tests.torture.disks        (as root: small file systems in memory are mounted)
"""

from __future__ import annotations

import argparse
import ctypes
import io
import json
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import torch
import yaml

from loramix.cli.main import run
from loramix.cli.output import quiet_libraries
from tests import ended
from tests.torture.forks import fork

SIZES_KB = (60, 150, 300, 450, 600, 750, 900, 1100, 1400, 1800)
"""Of the disk: full at the settings, in a checkpoint, at a saved expert, ..."""


def main() -> int:
    argparse.ArgumentParser(description=__doc__.partition("\n\n")[0]).parse_args()
    if os.geteuid() != 0:
        raise SystemExit("small file systems can be mounted by root only.")
    quiet_libraries()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        place = Path(scratch)
        whole = place / "whole"
        content = {**ended.settings(place, "moa", save_steps=1), "controls": []}
        ended.train(content, whole)
        expected = ended.left_by(whole)
        found = {f"full at {size} KB": full(place, content, expected, size) for size in SIZES_KB}
        found["read-only"] = read_only(place, content, expected)
        found["deleted"] = removed(place, content)
        found["clock"] = _clock(place, content, expected)
    print(json.dumps(found))
    return int(not all(one["ok"] for one in found.values()))


def _train(content: dict[str, Any], folder: Path) -> tuple[int, str]:
    """Returns exit code and what was said to stderr of `loramix train --resume`."""
    config = Path(content["model_name_or_path"]).parent / f"{folder.parent.name}-{folder.name}.yaml"
    config.write_text(yaml.safe_dump({**content, "output_dir": str(folder)}))
    said = io.StringIO()
    try:
        with redirect_stderr(said), redirect_stdout(io.StringIO()):
            code = run(["train", str(config), "--resume"])
    except Exception as error:
        return -1, f"{said.getvalue()}\nTraceback: {type(error).__name__}: {error}"
    return code, said.getvalue()


def _verdict(code: int, said: str, *, resumed: bool) -> dict[str, Any]:
    last = next((line for line in reversed(said.splitlines()) if line.strip()), "")
    right = code == 7 and "Traceback" not in said and resumed
    return {"ok": right, "code": code, "said": last[:120], "resumed": resumed}


def full(place: Path, content: dict[str, Any], expected: dict[str, Any], size: int) -> dict[str, Any]:
    """A disk of so many KB, and more room after."""
    with mounted(place / f"disk-{size}", f"size={size}k") as disk:
        code, said = _train(content, disk / "run")
        _mount("-o", "remount,size=64m", str(disk))
        again, _ = _train(content, disk / "run")
        return _verdict(code, said, resumed=again == 0 and ended.left_by(disk / "run") == expected)


def read_only(place: Path, content: dict[str, Any], expected: dict[str, Any], at: int = 15) -> dict[str, Any]:
    """A folder that is made read-only before a step. Root may write anywhere: a fork trains, and may no longer."""
    folder = place / "shut"

    def shut(call: int) -> None:
        if call == at:
            for one in [folder, *folder.rglob("*")]:
                if one.is_dir():
                    one.chmod(0o555)

    def train() -> None:
        _obey_permissions()
        with ended.calls(*ended.STEP, shut):
            result = _train(content, folder)
        (place / "told.txt").write_text(json.dumps(result))

    assert fork(train)[1]() == 0
    code, said = json.loads((place / "told.txt").read_text())
    for one in [folder, *folder.rglob("*")]:
        if one.is_dir():
            one.chmod(0o777)
    again, _ = _train(content, folder)
    return _verdict(code, said, resumed=again == 0 and ended.left_by(folder) == expected)


def _obey_permissions() -> None:
    """Takes CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH from this process; Python has no call for it."""
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)
    sets = (ctypes.c_uint32 * 6)()
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.capget(header, sets) == 0, os.strerror(ctypes.get_errno())
    sets[0] &= ~0b110
    assert libc.capset(header, sets) == 0, os.strerror(ctypes.get_errno())


def removed(place: Path, content: dict[str, Any], at: int = 15) -> dict[str, Any]:
    """A folder that is gone before a step."""
    folder = place / "deleted"
    with ended.calls(*ended.STEP, lambda call: shutil.rmtree(folder) if call == at else None):
        code, said = _train(content, folder)
    return _verdict(code, said, resumed=True)


def _clock(place: Path, content: dict[str, Any], expected: dict[str, Any]) -> dict[str, Any]:
    """The clock of the day jumps by a year, back and forth."""
    true, jumps = time.time, [0]

    def jumping() -> float:
        jumps[0] += 1
        return true() + (365 * 86400.0 if jumps[0] % 2 else -365 * 86400.0)

    time.time = jumping
    try:
        code, said = _train(content, place / "clock")
    finally:
        time.time = true
    same = ended.left_by(place / "clock") == expected
    return {"ok": code == 0 and same and "Traceback" not in said, "code": code, "jumps": jumps[0]}


@contextmanager
def mounted(folder: Path, options: str) -> Iterator[Path]:
    """A small file system in memory."""
    folder.mkdir()
    _mount("-t", "tmpfs", "-o", options, "tmpfs", str(folder))
    try:
        yield folder
    finally:
        subprocess.run(["/bin/umount", "-l", str(folder)], check=True)


def _mount(*words: str) -> None:
    subprocess.run(["/bin/mount", *words], check=True)


if __name__ == "__main__":
    raise SystemExit(main())
