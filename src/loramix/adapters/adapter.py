"""An adapter as two values: its settings and its tensors; read from a folder, written to one."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from loramix.adapters.suspicion import CONFIG, TENSORS, check_files, read_config, read_header
from loramix.errors import ModelError, Problems

PREFIX = "base_model.model."
"""What PEFT puts before the name of a module of the base."""


@dataclass(frozen=True)
class Adapter:
    """The content of an adapter folder.

    Attributes:
        config: adapter_config.json.
        tensors: adapter_model.safetensors, by PEFT's names without `base_model.model.`.
        where: the folder, for messages.
    """

    config: dict[str, Any]
    tensors: dict[str, Tensor]
    where: str

    @property
    def kind(self) -> str:
        """PEFT's name of the method: LORA, LORAMIX, ..."""
        return str(self.config.get("peft_type"))

    def fingerprint(self) -> str:
        """Returns a hash of the tensors, their names and bits."""
        found = hashlib.sha256()
        for name in sorted(self.tensors):
            tensor = self.tensors[name].contiguous()
            found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            found.update(tensor.view(torch.uint8).numpy().tobytes() if tensor.numel() else b"")
        return found.hexdigest()


def read_adapter(folder: str | Path) -> Adapter:
    """Returns the adapter of a folder; whatever is wrong with its files is found before its tensors are read.

    Raises:
        ModelError: see `suspicion`; or a tensor holds NaN or infinity.
    """
    folder = Path(folder).expanduser()
    check_files(folder)
    config = read_config(folder / CONFIG)
    read_header(folder / TENSORS)
    try:
        tensors = load_file(folder / TENSORS)
    except (SafetensorError, OSError, ValueError) as error:
        raise ModelError(f"{folder / TENSORS}: cannot be read ({str(error).splitlines()[0]}). Get it anew.") from error
    check_finite(tensors, str(folder))
    return Adapter(config, {name.removeprefix(PREFIX): tensor for name, tensor in tensors.items()}, str(folder))


def check_finite(tensors: Mapping[str, Tensor], where: str) -> None:
    """Raises a ModelError that names every tensor with NaN or infinity."""
    problems = Problems(where)
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            problems.add(f"{name} holds NaN or infinity. The training that wrote it diverged: use an earlier one.")
    problems.raise_as(ModelError)


def write_adapter(adapter: Adapter, folder: Path, extra: Mapping[str, str] | None = None) -> None:
    """Writes an adapter as PEFT does, in place of what is there; the folder is the old or the new one, never half.

    Args:
        adapter: settings and tensors.
        folder: where to.
        extra: further text files, by name; files of the old folder that are not among them are kept.
    """
    folder = folder.resolve()  # "." has no name to put something beside
    making = folder.with_name(folder.name + ".making")
    shutil.rmtree(making, ignore_errors=True)
    making.mkdir(parents=True)
    if folder.is_dir():
        for old in folder.iterdir():
            if old.is_file() and old.name not in (CONFIG, TENSORS):
                shutil.copy2(old, making / old.name)
    for name, text in (extra or {}).items():
        (making / name).write_text(text, encoding="utf-8")
    tensors = {PREFIX + name: tensor.contiguous() for name, tensor in adapter.tensors.items()}
    save_file(tensors, making / TENSORS, metadata={"format": "pt"})
    # Sorted and without a newline at the end, as PEFT writes it: an adapter that is read and written stays the same.
    (making / CONFIG).write_text(json.dumps(adapter.config, indent=2, sort_keys=True), encoding="utf-8")
    _to_disk(making)
    replace_folder(making, folder)


def replace_folder(new: Path, folder: Path) -> None:
    """Puts a finished folder in the place of another; a crash leaves one of the two there, or the old one beside it."""
    old = folder.with_name(folder.name + ".replaced")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    new.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def _to_disk(folder: Path) -> None:
    for file in folder.iterdir():
        with file.open("rb") as opened:
            os.fsync(opened.fileno())
