"""What a later stage takes over from the run it goes on with: experts, a calibration, and what was measured before."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from loramix.adapters.adapter import read_adapter, write_adapter
from loramix.adapters.lora import Lora
from loramix.adapters.mixture import check_mixture, take_lora
from loramix.errors import ModelError, Problems
from loramix.opening import load_experts
from loramix.preparation import Prepared
from loramix.run_folder import RunFolder
from loramix.tuner.config import LoramixConfig

EARLIER_MODELS = ("base", "single", "single_long", "mixed")
"""Models that a later stage neither trains nor changes."""


def experts_for(prepared: Prepared, stage: str) -> dict[str, Lora]:
    """Returns the experts a stage starts from: for routers alone those of the run's model, if it has one, because they
    stay as they are; else what stage 1 or an import left.

    Raises:
        ModelError: one is missing.
    """
    run = prepared.run
    if stage == "routers" and (run.model / "adapter_config.json").is_file():
        adapter = read_adapter(run.model)
        config = check_mixture(adapter)
        found = {name: take_lora(adapter, config, name) for name in config.experts or []}
        return found | load_experts(run, [name for name in prepared.domains if name not in found])
    return load_experts(run, prepared.domains)


def check_scaling(experts: Mapping[str, Lora], config: LoramixConfig) -> None:
    """Raises a ModelError that names every expert whose matrices were trained under another scaling than the mixture's:
    put in unchanged it would say something else."""
    problems = Problems("the experts of the mixture")
    for name, lora in experts.items():
        scalings = sorted(set(lora.scalings.values()))
        if any(abs(scaling - config.scaling) > 1e-9 for scaling in scalings):
            problems.add(
                f"{name}: was trained with a scaling (lora_alpha / r, or with use_rslora / sqrt(r)) of "
                f"{', '.join(f'{one:g}' for one in scalings)}, the settings give {config.scaling:g}. Set r, lora_alpha "
                "and use_rslora as it was trained, or train it anew."
            )
    problems.raise_as(ModelError)


def earlier_rows(run: RunFolder, counts: Mapping[str, Any]) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Returns the rows and stages of results.json that a later stage leaves true: of models it does not touch, on
    domains whose held-out data are what they were.

    Args:
        run: whose results they are.
        counts: of the data now, as data.json has them.
    """
    if not run.results.is_file():
        return [], {}
    earlier = json.loads(run.results.read_text(encoding="utf-8"))
    before = json.loads(run.data.read_text(encoding="utf-8")) if run.data.is_file() else {}
    same = {domain for domain in counts if (before.get(domain) or {}).get("test") == counts[domain].get("test")}
    rows = [row for row in earlier["rows"] if row["model"] in EARLIER_MODELS and row["domain"] in same]
    kept = ("expert ", "longer ", "mixed")
    return rows, {name: stage for name, stage in earlier["stages"].items() if name.startswith(kept)}


def keep_calibration(run: RunFolder, before: Any) -> bool:
    """Puts the calibration of the model before into the one that took its place, if its routers read the same: then a
    prompt is as far from all domains as it was. Else abstention.json goes too. Returns whether it was kept.

    Args:
        run: with the new model in place.
        before: the adapter that was there, or None.
    """
    if before is None or not before.config.get("abstention"):
        return True
    now = read_adapter(run.model)
    reading = ("reads", "pooling")
    old, new = ({key: one.config["router"].get(key) for key in reading} for one in (before, now))
    if old != new or old["reads"] != "base" or now.config["experts"] != before.config["experts"]:
        run.abstention.unlink(missing_ok=True)
        return False
    part = {name: tensor for name, tensor in before.tensors.items() if ".abstention." in name}
    config = {**now.config, "abstention": before.config["abstention"]}
    write_adapter(replace(now, config=config, tensors={**now.tensors, **part}), run.model)
    return True
