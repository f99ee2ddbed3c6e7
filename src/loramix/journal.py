"""What of a run is done, in progress.json: so that it can go on where it was ended, and is what it was begun as."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from loramix.errors import StorageError
from loramix.processes import writes
from loramix.run_folder import write_json


class Journal:
    """The parts of a run that are done: what was trained, into which folder, and what was measured.

    Args:
        file: progress.json.
        identity: what the run is: settings, base, data.
        done: what was done before, as `read_journal` returns it.
    """

    def __init__(self, file: Path, identity: Mapping[str, Any], done: Mapping[str, Any] | None = None) -> None:
        self._file = file
        nothing = {"run": digest(identity), "finished": False, "log_bytes": 0, "trained": {}, "measured": {}}
        self._content: dict[str, Any] = {**nothing, **(done or {}), "identity": dict(identity)}
        write_json(self._file, self._content)

    @property
    def run(self) -> str:
        """A name for what the run was begun as; stays what it was where going on under other settings was forced."""
        return str(self._content["run"])

    @property
    def finished(self) -> bool:
        """Whether nothing is left to do."""
        return bool(self._content["finished"])

    @property
    def log_bytes(self) -> int:
        """How long the log was after the last part that is done."""
        return int(self._content["log_bytes"])

    def trained(self, title: str, folder: Path) -> dict[str, Any] | None:
        """Returns what a stage saw, if it is done and its folder holds what it left; else None."""
        found = self._content["trained"].get(title)
        if found is None or sums_of(folder) != found["files"]:
            return None
        stage = found["stage"]
        assert isinstance(stage, dict)
        return stage

    def measured(self, title: str) -> list[dict[str, Any]] | None:
        """Returns the rows that were measured of a model, if it is done."""
        found: list[dict[str, Any]] | None = self._content["measured"].get(title)
        return found

    def note_trained(self, title: str, folder: Path, stage: Mapping[str, Any], log: Path) -> None:
        """Takes note that a stage is done and its model lies in a folder. Its measurements are to be made anew."""
        self._content["trained"][title] = {"stage": dict(stage), "files": sums_of(folder)}
        self._content["measured"].pop(title, None)
        self._content["log_bytes"] = log.stat().st_size if log.is_file() else 0
        self._write()

    def note_measured(self, title: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """Takes note of what was measured."""
        self._content["measured"][title] = [dict(row) for row in rows]
        self._write()

    def note_finished(self) -> None:
        """Takes note that nothing is left to do."""
        self._content["finished"] = True
        self._write()

    def _write(self) -> None:
        if writes() and not self._file.exists():
            raise StorageError(f"{self._file} is gone: somebody removed the run while it was at work.")
        write_json(self._file, self._content)


def read_journal(file: Path) -> dict[str, Any] | None:
    """Returns what a journal holds; None where there is none, or what is there is not whole."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    kinds = {"run": str, "identity": dict, "finished": bool, "log_bytes": int, "trained": dict, "measured": dict}
    if not isinstance(content, dict) or any(not isinstance(content.get(key), kind) for key, kind in kinds.items()):
        return None
    return content


def sums_of(folder: Path) -> dict[str, str]:
    """Returns the SHA-256 of each file of a folder, by name; empty where there is no folder."""
    if not folder.is_dir():
        return {}
    sums = {}
    for file in sorted(folder.iterdir()):
        if file.is_file():
            with file.open("rb") as content:
                sums[file.name] = hashlib.file_digest(content, "sha256").hexdigest()
    return sums


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Returns each value that two identities do not share, "what: was ..., is ...".

    Args:
        before, now: nested JSON.
    """
    old, new = _flat(before), _flat(now)
    return [
        f"{key}: was {_shown(old.get(key))}, is now {_shown(new.get(key))}"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key)
    ]


def digest(identity: Mapping[str, Any]) -> str:
    """Returns one short name for an identity."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]


def _flat(content: Any, name: str = "") -> dict[str, Any]:
    if not isinstance(content, dict) or not content:
        return {name: content}
    found: dict[str, Any] = {}
    for key, value in content.items():
        found |= _flat(value, f"{name}.{key}" if name else str(key))
    return found


def _shown(value: Any) -> str:
    text = "not there" if value is None else json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
