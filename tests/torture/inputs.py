"""120 malformed data files through the command, each in a process of its own: file and place and cause, exit code 3, in
less than five seconds and 500 MB. 200 names that are paths: none makes anything outside the run's folder.

    python -m tests.torture.inputs
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import re
import resource
import tempfile
import time
from pathlib import Path
from typing import Any

import yaml

from loramix.cli.main import run
from loramix.cli.output import quiet_libraries
from tests import ended
from tests.malformed import Malformed, malformed
from tests.path_names import path_names
from tests.torture.forks import fork

MOST_SECONDS, MOST_MB = 5.0, 500.0


def main() -> int:
    argparse.ArgumentParser(description=__doc__.partition("\n\n")[0]).parse_args()
    quiet_libraries()
    with tempfile.TemporaryDirectory() as scratch:
        place = Path(scratch)
        content = {**ended.settings(place, "lora"), "controls": []}
        files = [_file(place, content, case) for case in malformed()]
        names = [_name(place, content, name) for name in path_names()]
    found = {
        "files": len(files),
        "named by place and cause": sum(one["named"] for one in files),
        "slowest, seconds": max(one["seconds"] for one in files),
        "most memory, MB": max(one["mb"] for one in files),
        "names": len(names),
        "escaped": sum(not inside for inside in names),
    }
    print(json.dumps(found))
    soon = found["slowest, seconds"] < MOST_SECONDS and found["most memory, MB"] < MOST_MB
    return int(found["named by place and cause"] != len(files) or not soon or found["escaped"] > 0)


def _train(content: dict[str, Any], config: Path) -> tuple[int, str]:
    config.write_text(yaml.safe_dump(content))
    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
        code = run(["train", str(config)])
    return code, said.getvalue()


def _file(place: Path, content: dict[str, Any], case: Malformed) -> dict[str, Any]:
    bad = place / case.name
    bad.write_bytes(case.content)
    wrong = {**content, "data": {"domains": {"bad": str(bad), **content["data"]["domains"]}}, "output_dir": "never"}
    told = place / "told.json"

    def work() -> None:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        started = time.monotonic()
        code, said = _train(wrong, place / "wrong.yaml")
        found = {
            "named": code == 3 and bool(re.search(re.escape(str(bad)) + case.said, said)) and "Traceback" not in said,
            "seconds": round(time.monotonic() - started, 2),
            "mb": round((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024, 1),
        }
        told.write_text(json.dumps(found))
        if not found["named"]:
            print(f"{case.name}: exit {code}: {said[:300]}")

    assert fork(work)[1]() == 0, case.name
    bad.unlink()
    found: dict[str, Any] = json.loads(told.read_text())
    return found


def _name(place: Path, content: dict[str, Any], name: str) -> bool:
    """Returns whether all that came of a domain of this name is in the run's folder."""
    home = place / "home"
    home.mkdir(exist_ok=True)
    before = _there(place)
    domains = dict(zip([name, "other"], content["data"]["domains"].values(), strict=False))
    named = {**content, "data": {"domains": domains, "max_length": 64}, "output_dir": str(home / "run")}
    named["training"] = {**content["training"], "max_steps": 1}

    def work() -> int:
        return _train(named, place / "named.yaml")[0]

    code = fork(work)[1]()
    made = _there(place) - before - {place / "named.yaml"}
    inside = all(one.resolve().is_relative_to((home / "run").resolve()) for one in made)
    if not inside or code not in (0, 2, 3):
        print(f"{name!r}: exit {code}: {sorted(map(str, made))[:5]}")
    for one in sorted(made, reverse=True):
        one.rmdir() if one.is_dir() and not one.is_symlink() else one.unlink()
    return inside and code in (0, 2, 3)


def _there(place: Path) -> set[Path]:
    return set(place.rglob("*"))


if __name__ == "__main__":
    raise SystemExit(main())
