"""An export made a run again: the same mixture, bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from loramix.adapters.adapter import read_adapter, write_adapter
from loramix.adapters.alike import short_targets
from loramix.adapters.lora import as_lora, lora_adapter
from loramix.adapters.mixture import check_mixture
from loramix.environment import environment
from loramix.experiment import as_yaml, build
from loramix.lifecycle.export import read_export, read_manifest
from loramix.lifecycle.importing import base_of, check_fits, sizes_of
from loramix.methods import method_named
from loramix.preparation import anchored
from loramix.run_folder import RunFolder, write_json, write_text_safely

_WHERE = ("layers_to_transform", "exclude_modules", "bank")
"""Settings of the mixture that its target modules alone do not say."""


def import_export(
    folder: Path, output_dir: str, *, base: str | None = None, any_base_name: bool = False
) -> dict[str, Any]:
    """Makes a run of an export. Nothing is written before all of it is found good.

    Args:
        folder: what `export_experts` wrote.
        output_dir: of the run; must hold none.
        base, any_base_name: see `importing.base_of`.

    Returns:
        what was made, as it is written to imported.json.

    Raises:
        ModelError, ConfigError: with all problems.
    """
    adapter = read_export(folder)
    config = check_mixture(adapter)
    names = list(config.experts or [])
    experts = {name: as_lora(read_adapter(folder / name)) for name in names}
    name = base_of(experts, base, any_base_name=any_base_name)
    sizes = sizes_of(name)
    check_fits(experts, sizes)
    method = method_named(config.method)
    settings: dict[str, Any] = {
        "r": config.r,
        "lora_alpha": config.lora_alpha,
        "lora_dropout": config.lora_dropout,
        "use_rslora": config.use_rslora,
        "target_modules": adapter.config["target_modules"],
        **{key: adapter.config[key] for key in _WHERE if adapter.config.get(key) is not None},
    }
    if method.router is not None:
        settings |= {"router": config.router, "scope": config.scope, "decision": config.decision}
    content = {
        "output_dir": output_dir,
        "model_name_or_path": name,
        "method": method.name,
        **({"dtype": dtype} if (dtype := read_manifest(folder).get("dtype")) else {}),
        "data": {"domains": dict.fromkeys(names)},
        "adapter": settings,
    }
    experiment = build(content, where="the imported mixture", with_data=False).experiment
    run = RunFolder(Path(output_dir))
    run.create()
    for expert in names:
        # Written anew, not copied: the stranger's settings say where its matrices came from, and no more.
        targets = short_targets(list(experts[expert].modules), list(sizes))
        write_adapter(lora_adapter(experts[expert], targets), run.expert(expert))
    write_adapter(adapter, run.model)
    write_text_safely(run.config, as_yaml(anchored(experiment)))
    write_json(run.environment, environment())
    made = {"base": name, "method": method.name, "ready": "yes", "experts": [{"name": n} for n in names]}
    made["from"] = str(folder)
    write_json(run.path / "imported.json", made)
    return made
