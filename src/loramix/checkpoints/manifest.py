"""The list of a checkpoint's files and their sums, written last: a folder without one that fits is no checkpoint."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from loramix.errors import ModelError

MANIFEST = "manifest.json"
SCHEMA = 1
MOST_BYTES = 1 << 20
"""A manifest is a few kilobytes; something larger is not read."""


class Damaged(ModelError):
    """A checkpoint that is not what was written."""


def seal(folder: Path, about: Mapping[str, Any]) -> None:
    """Writes the manifest of a folder's files, and waits until all of it is on disk.

    Args:
        folder: holds files only.
        about: what else is to be known of the checkpoint; JSON.
    """
    files = {}
    for file in sorted(folder.iterdir()):
        files[file.name] = {"bytes": file.stat().st_size, "sha256": sha256_of(file)}
        flush(file)
    manifest = folder / MANIFEST
    manifest.write_bytes(_encoded({"schema": SCHEMA, "files": files, "about": dict(about)}))
    flush(manifest)
    flush(folder)


def verified(folder: Path) -> dict[str, Any]:
    """Returns what is known about a checkpoint after checking every byte of it.

    Raises:
        Damaged: what is wrong with it, in one line.
    """
    if folder.is_symlink() or not folder.is_dir():
        raise Damaged(f"{folder.name} is no folder of its own")
    content = _read(folder)
    expected = content["files"]
    there = {file.name for file in folder.iterdir()} - {MANIFEST}
    if missing := sorted(set(expected) - there):
        raise Damaged(f"{', '.join(missing)} missing")
    if more := sorted(there - set(expected)):
        raise Damaged(f"{', '.join(more)} does not belong to it")
    for name, one in expected.items():
        file = folder / name
        if file.is_symlink() or not file.is_file():
            raise Damaged(f"{name} is no file of its own")
        try:
            if file.stat().st_size != one["bytes"]:
                raise Damaged(f"{name} has {file.stat().st_size} bytes instead of {one['bytes']}")
            if sha256_of(file) != one["sha256"]:
                raise Damaged(f"the content of {name} has changed")
        except OSError as error:
            raise Damaged(f"{name} cannot be read ({error.strerror})") from error
    about = content["about"]
    assert isinstance(about, dict)
    return about


def sha256_of(file: Path) -> str:
    """Returns a file's sum in hexadecimal."""
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def flush(path: Path) -> None:
    """Waits until a file, or the list of a folder's files, is on disk."""
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def _read(folder: Path) -> dict[str, Any]:
    manifest = folder / MANIFEST
    try:
        if manifest.is_symlink() or not manifest.is_file():
            raise Damaged(f"{MANIFEST} is missing: it was never finished")
        if manifest.stat().st_size > MOST_BYTES:
            raise Damaged(f"{MANIFEST} is too large to be one")
        raw = manifest.read_bytes()
        content = json.loads(raw)["content"]
        same = raw == _encoded(content)
    except OSError as error:
        raise Damaged(f"{MANIFEST} cannot be read ({error.strerror})") from error
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise Damaged(f"{MANIFEST} is not whole") from error
    # The bytes are compared, not only the sum: so a change anywhere shows, also in what JSON would overlook.
    if not same:
        raise Damaged(f"{MANIFEST} has changed")
    if content.get("schema") != SCHEMA:
        raise Damaged(f"it has version {content.get('schema')} of its layout, this loramix reads {SCHEMA}")
    assert isinstance(content, dict)
    return content


def _encoded(content: Mapping[str, Any]) -> bytes:
    text = json.dumps(content, sort_keys=True, ensure_ascii=False, allow_nan=False)
    whole = {"content": content, "sha256": hashlib.sha256(text.encode()).hexdigest()}
    return (json.dumps(whole, sort_keys=True, ensure_ascii=False, indent=1) + "\n").encode()
