"""What may lie in an adapter folder, checked before anything of it is loaded.

An adapter comes from strangers. Nothing in it is run, followed or believed: no pickle, no link out of the folder, no
key that names code, no header that is larger than an adapter can need.
"""

from __future__ import annotations

import json
import re
import stat
from pathlib import Path
from typing import Any

from loramix.errors import ModelError, Problems
from loramix.models.trust import CODE_KEYS

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
MOST_CONFIG_BYTES = 1_000_000
MOST_HEADER_BYTES = 10_000_000
"""Of a safetensors header; the format allows 100 MB. A mixture of 80 layers needs about 300 kB."""
PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".mdl")
DTYPES = ("F64", "F32", "F16", "BF16")


def check_files(folder: Path) -> None:
    """Checks that a folder holds an adapter's two files, as plain files of a plausible size, and no pickle in their
    place.

    Raises:
        ModelError: with all that is wrong.
    """
    problems = Problems(str(folder))
    if not folder.is_dir():
        problems.add("no such folder. Expected a folder with adapter_config.json and adapter_model.safetensors.")
    else:
        for name in (CONFIG, TENSORS):
            if problem := file_problem(folder / name):
                problems.add(problem)
        pickles = sorted(p.name for p in folder.iterdir() if p.suffix in PICKLES)
        if pickles and not (folder / TENSORS).exists():
            problems.messages = [m for m in problems.messages if not m.startswith(TENSORS)]
            problems.add(
                f"{', '.join(pickles)}: weights as pickle only, which can run code when it is read. Expected "
                f"{TENSORS}: save the adapter again with a current PEFT (safe_serialization, its default)."
            )
        if not problems and (folder / CONFIG).stat().st_size > MOST_CONFIG_BYTES:
            problems.add(f"{CONFIG} is larger than {MOST_CONFIG_BYTES // 1000} kB. It is no adapter's settings.")
    problems.raise_as(ModelError)


def file_problem(file: Path) -> str | None:
    """Returns why a file is not read, or None: it is missing, no plain file, or a link that leads elsewhere."""
    if not file.exists() and not file.is_symlink():
        return f"{file.name} is missing. The folder holds no whole adapter."
    if file.is_symlink():
        # The Hub's own cache links each file of snapshots/REVISION/... to blobs beside snapshots; any other link out of
        # the folder is refused.
        target, folder = file.resolve(), file.parent.resolve()
        blobs = next(
            (up.parent.parent / "blobs" for up in (folder, *folder.parents) if up.parent.name == "snapshots"), None
        )
        if target.parent not in (folder, blobs):
            return f"{file.name} is a link to {target}, out of the folder. Copy the file itself here."
    if not stat.S_ISREG(file.stat().st_mode):
        return f"{file.name} is no plain file."
    return None


def read_config(file: Path) -> dict[str, Any]:
    """Returns the settings of an adapter.

    Raises:
        ModelError: it is no JSON object, or holds keys that name code or are internal to a library.
    """
    problems = Problems(str(file))
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{file}: is no JSON ({str(error).splitlines()[0][:200]}). Get the adapter anew.") from error
    if not isinstance(content, dict):
        raise ModelError(f"{file}: holds {type(content).__name__}, expected settings by name. Get the adapter anew.")
    for key in _all_keys(content):
        if key in CODE_KEYS:
            problems.add(f"{key}: names code to be run, or a permission to do so. A file is never given that say.")
        elif key.startswith("_"):
            problems.add(f"{key}: internal to a library; a file that sets it means to change how it is loaded.")
    problems.raise_as(ModelError)
    return content


def _all_keys(content: Any, depth: int = 0) -> list[str]:
    if depth > 20:
        return []
    if isinstance(content, list):
        return [key for one in content for key in _all_keys(one, depth + 1)]
    if not isinstance(content, dict):
        return []
    return [k for key, value in content.items() for k in (str(key), *_all_keys(value, depth + 1))]


def read_header(file: Path) -> dict[str, tuple[int, ...]]:
    """Returns the shapes of the tensors in a safetensors file by name, from its header alone.

    Raises:
        ModelError: the header is too large, cut off, no JSON, or names tensors of a type that is no weight.
    """
    size = file.stat().st_size
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        if length > MOST_HEADER_BYTES:
            raise ModelError(
                f"{file}: its header is {length / 1e6:.0f} MB long, more than the {MOST_HEADER_BYTES // 10**6} MB that "
                "an adapter can need. Not read."
            )
        if size < 8 or length > size - 8:
            raise ModelError(f"{file}: is cut off ({size} bytes). Get the adapter anew.")
        raw = opened.read(length)
    try:
        header = json.loads(raw)
        entries = {str(name): one for name, one in header.items() if name != "__metadata__"}
        shapes = {name: tuple(int(n) for n in one["shape"]) for name, one in entries.items()}
        kinds = {name: str(one["dtype"]) for name, one in entries.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ModelError(f"{file}: is no safetensors file. Get the adapter anew.") from error
    problems = Problems(str(file))
    for name, kind in kinds.items():
        if kind not in DTYPES:
            problems.add(f"{name} has type {kind}. Expected weights, one of {', '.join(DTYPES)}.")
        if not re.fullmatch(r"[\w.]+", name):
            problems.add(f"{name[:80]!r} is no tensor's name. Expected letters, digits, _ and dots.")
    problems.raise_as(ModelError)
    return shapes
