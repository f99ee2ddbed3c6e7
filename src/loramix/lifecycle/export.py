"""A mixture as what everybody can load: an ordinary PEFT LoRA for each expert, the routers beside them; and back.

NAME/adapter_config.json, NAME/adapter_model.safetensors    one for each expert: stock PEFT, vLLM, TRL load it
router.safetensors                                          the routers' tensors
manifest.json                                               what belongs together, with a hash of every file
README.md                                                   what it is, what was measured, how to load it
"""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from loramix import __version__
from loramix.adapters.adapter import Adapter, check_finite, read_adapter, replace_folder, write_adapter
from loramix.adapters.alike import short_targets
from loramix.adapters.lora import as_lora, lora_adapter
from loramix.adapters.mixture import check_mixture, router_tensors, stacked, take_lora, whole_experts_problem
from loramix.adapters.suspicion import file_problem, read_header
from loramix.data.domains import name_problem
from loramix.errors import ConfigError, ModelError, Problems
from loramix.experiment import load
from loramix.lifecycle.card import card
from loramix.run_folder import RunFolder, write_json

MANIFEST, ROUTER = "manifest.json", "router.safetensors"
FORMAT, VERSION = "loramix-experts", 1


def export_experts(adapter: Adapter, folder: Path, run: RunFolder | None, linears: list[str]) -> dict[str, Any]:
    """Writes a mixture's experts as PEFT LoRAs, with routers and manifest; returns the manifest.

    Args:
        adapter: the mixture, or a single expert.
        folder: where to; must not exist, or be an earlier export.
        run: the run it comes from, for the card.
        linears: the base's linear layers, see `short_targets`.

    Raises:
        ConfigError: the method's experts are no adapters by themselves, or the folder holds something else.
    """
    config = check_mixture(adapter)
    if problem := whole_experts_problem(config):
        raise ConfigError(problem)
    folder = folder.resolve()
    _check_folder(folder)
    making = folder.with_name(folder.name + ".making")
    shutil.rmtree(making, ignore_errors=True)
    making.mkdir(parents=True)
    for name in config.experts or []:
        lora = take_lora(adapter, config, name)
        write_adapter(lora_adapter(lora, short_targets(list(lora.modules), linears)), making / name)
    if routers := router_tensors(adapter):
        save_file({k: t.contiguous() for k, t in routers.items()}, making / ROUTER, metadata={"format": "pt"})
    files = {str(p.relative_to(making)): _sha256(p) for p in sorted(making.rglob("*")) if p.is_file()}
    manifest = {
        "format": FORMAT,
        "version": VERSION,
        "loramix": __version__,
        "base": adapter.config.get("base_model_name_or_path"),
        "dtype": None if run is None else load(run.config, with_data=False).experiment.dtype,
        "method": config.method,
        "experts": list(config.experts or []),
        "adapter_config": adapter.config,
        "sha256": files,
    }
    (making / "README.md").write_text(card(manifest, run), encoding="utf-8")
    write_json(making / MANIFEST, manifest)
    replace_folder(making, folder)
    return manifest


def _check_folder(folder: Path) -> None:
    """Raises a ConfigError unless a folder is new, empty, or holds an export of ours and nothing beside it."""
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"{folder}: is a file. Name an empty or a new folder.")
    if not folder.exists() or not any(folder.iterdir()):
        return
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        ours = set(manifest["sha256"]) if manifest["format"] == FORMAT else set()
    except (OSError, ValueError, KeyError, TypeError):
        ours = set()
    there = {str(p.relative_to(folder)) for p in folder.rglob("*") if not p.is_dir()}
    foreign = sorted(there - ours - {MANIFEST, "README.md"})
    if not ours or foreign:
        what = ", ".join(foreign[:5]) or "no manifest of ours"
        raise ConfigError(
            f"{folder}: holds something else than an export ({what}), which would be lost. Name an empty or a new "
            "folder."
        )


def is_export(folder: Path) -> bool:
    """Whether a folder says that it is an export of ours."""
    return (folder / MANIFEST).is_file()


def read_export(folder: Path) -> Adapter:
    """Returns the mixture that was exported, bit for bit.

    Raises:
        ModelError: a newer format; a file that is missing, changed, or leads out of the folder; experts that are not of
            one make, or do not fit the routers.
    """
    manifest = read_manifest(folder)
    problems = Problems(str(folder))
    for name in manifest["experts"]:
        if not isinstance(name, str) or name_problem(name):
            problems.add(f"experts: {str(name)[:40]!r} is no name. Expected letters, digits, spaces or _ . + -.")
    for file, wanted in manifest["sha256"].items():
        parts = Path(file).parts
        if not parts or Path(file).is_absolute() or ".." in parts or len(parts) > 2:
            problems.add(f"{file[:80]!r}: leads out of the folder.")
        elif wrong := file_problem(folder / file) or _link_above(folder, file):
            problems.add(f"{file}: {wrong}")
        elif _sha256(folder / file) != wanted:
            problems.add(f"{file}: was changed after the export. Export it again.")
    problems.raise_as(ModelError)
    experts = {name: as_lora(read_adapter(folder / name)) for name in manifest["experts"]}
    if len({(one.plain, tuple(sorted(one.modules))) for one in experts.values()}) != 1:
        raise ModelError(f"{folder}: its experts differ in rank, scaling or modules. They are from different exports.")
    tensors = stacked(experts)
    if (folder / ROUTER).is_file():
        if ROUTER not in manifest["sha256"]:
            raise ModelError(f"{folder / ROUTER}: is not in the manifest. It belongs to another export.")
        read_header(folder / ROUTER)
        routers = load_file(folder / ROUTER)
        check_finite(routers, str(folder / ROUTER))
        tensors |= routers
    adapter = Adapter(manifest["adapter_config"], tensors, str(folder))
    check_mixture(adapter)
    return adapter


def _link_above(folder: Path, file: str) -> str | None:
    parent = (folder / file).parent
    return (
        f"{parent.name} is a link. Copy the folder itself here." if parent != folder and parent.is_symlink() else None
    )


def read_manifest(folder: Path) -> dict[str, Any]:
    """Returns the manifest of an export.

    Raises:
        ModelError: there is none, or it is none of ours, or of a newer version.
    """
    from loramix.adapters.suspicion import read_config

    if wrong := file_problem(folder / MANIFEST):
        raise ModelError(f"{folder}: {wrong}")
    manifest = read_config(folder / MANIFEST)
    wanted = {"format": str, "version": int, "experts": list, "adapter_config": dict, "sha256": dict}
    missing = [key for key, kind in wanted.items() if not isinstance(manifest.get(key), kind)]
    if missing or manifest["format"] != FORMAT:
        raise ModelError(f"{folder / MANIFEST}: is no manifest of ours ({', '.join(missing) or 'format'} is wrong).")
    if manifest["version"] > VERSION:
        raise ModelError(
            f"{folder / MANIFEST}: version {manifest['version']}, written by a newer loramix; this one reads up to "
            f"{VERSION}. Upgrade loramix."
        )
    return manifest


def _sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def equal(one: Adapter, other: Adapter) -> bool:
    """Whether two adapters are the same: settings, names of tensors and every bit of them."""
    return (
        json.dumps(one.config, sort_keys=True) == json.dumps(other.config, sort_keys=True)
        and one.tensors.keys() == other.tensors.keys()
        and all(torch.equal(tensor, other.tensors[name]) for name, tensor in one.tensors.items())
    )
