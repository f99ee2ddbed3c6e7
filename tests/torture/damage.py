"""Bits flipped in a real checkpoint, and whole damages of the newest: seen, and the one before is taken.

python -m tests.torture.damage [--flips 1000]
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch

from loramix.checkpoints.manifest import Damaged, verified
from loramix.cli.output import quiet_libraries
from tests import ended
from tests.test_checkpoints import DAMAGE


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--flips", type=int, default=1000)
    args = parser.parse_args()
    quiet_libraries()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        found = torture(Path(scratch), args.flips)
    print(json.dumps(found))
    return int(found["seen"] != found["flips"] or found["silent"] > 0 or found["fell_back"] < 0.95 * found["damages"])


def torture(place: Path, flips: int) -> dict[str, Any]:
    """Returns how many flips were seen, and what became of a training whose newest checkpoint was damaged."""
    content = {**ended.settings(place, "moa", save_steps=1), "controls": []}
    ended.train(content, place / "whole")
    expected = ended.left_by(place / "whole")
    broken = place / "broken"
    try:
        with ended.calls(*ended.STEP, ended.killed_at(10)):
            ended.train(content, broken)
    except ended.Killed:
        pass
    folders = sorted(broken.glob("checkpoints/*/step-*"))
    assert len(folders) == 2, "there is one to damage and one to fall back on"
    seen = sum(_flip(folders[-1], random.Random(number)) for number in range(flips))
    fell_back = equal = silent = 0
    for name, damage in DAMAGE.items():
        run = place / "damaged"
        shutil.copytree(broken, run, symlinks=True)
        folder = sorted(run.glob("checkpoints/*/step-*"))[-1]
        damage(folder)
        ended.train(content, run, resume=True)
        said = run.with_suffix(".screen").read_text()
        same = ended.left_by(run) == expected
        equal += same
        fell_back += "not used" in said and same
        silent += not same or "not used" not in said
        if not same or "not used" not in said:
            print(f"{name}: equal {same}, told {'not used' in said}")
        shutil.rmtree(run)
        run.with_suffix(".screen").unlink()
    found = {"fell_back": fell_back, "equal": equal, "silent": silent}
    return {"flips": flips, "seen": seen, "damages": len(DAMAGE), **found}


def _flip(folder: Path, draw: random.Random) -> bool:
    """Flips a bit, any bit of all files being as likely as another, and back; returns whether it was seen."""
    files = sorted(folder.iterdir())
    file = draw.choices(files, [one.stat().st_size for one in files])[0]
    whole = file.read_bytes()
    place = draw.randrange(8 * len(whole))
    flipped = bytearray(whole)
    flipped[place // 8] ^= 1 << place % 8
    file.write_bytes(flipped)
    try:
        verified(folder)
    except Damaged:
        return True
    finally:
        file.write_bytes(whole)
    return False


if __name__ == "__main__":
    raise SystemExit(main())
