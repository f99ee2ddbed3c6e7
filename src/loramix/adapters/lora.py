"""An ordinary PEFT LoRA as one expert: its matrices and scalings by module, whatever rank and alpha each module has."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from peft import LoraConfig
from peft.utils.other import get_pattern_key
from torch import Tensor

from loramix.adapters.adapter import Adapter
from loramix.errors import ModelError, Problems

_READ = {"r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "peft_type", "init_lora_weights"}
"""Settings that are taken into account."""
_WITHOUT_EFFECT = {
    "auto_mapping",
    "base_model_name_or_path",
    "corda_config",
    "ensure_weight_tying",
    "eva_config",
    "exclude_modules",
    "fan_in_fan_out",
    "inference_mode",
    "layers_pattern",
    "layers_to_transform",
    "loftq_config",
    "lora_dropout",
    "lora_ga_config",
    "peft_version",
    "qalora_group_size",
    "revision",
    "target_modules",
    "task_type",
}
"""Settings that say where the matrices came from or where they are; the tensors' own names and shapes say so too."""
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Values of init_lora_weights under which PEFT changes the base's weights too, so that the file alone is not enough."""


@dataclass(frozen=True)
class Lora:
    """One expert as matrices.

    Attributes:
        modules: by module of the base: A (R, I) and B (O, R); the delta is scaling * B A.
        scalings: by module.
        plain: (r, lora_alpha, use_rslora) where all modules have the same; else None.
        base: name of the base it was trained on, or None.
        where: the folder, for messages.
    """

    modules: dict[str, tuple[Tensor, Tensor]]
    scalings: dict[str, float]
    plain: tuple[int, float, bool] | None
    base: str | None
    where: str

    @property
    def rank(self) -> int:
        """Largest rank of a module."""
        return max(down_RI.shape[0] for down_RI, _ in self.modules.values())


def as_lora(adapter: Adapter) -> Lora:
    """Returns a PEFT LoRA, or a loramix adapter of method lora, as one expert.

    Raises:
        ModelError: another method; a setting that changes what it computes beyond plain LoRA; tensors that are missing,
            left over, or of another rank than the settings say. All at once.
    """
    if adapter.kind == "LORAMIX" and adapter.config.get("method") == "lora":
        return _own(adapter)
    if adapter.kind != "LORA":
        raise ModelError(f"{adapter.where}: a {adapter.kind} adapter. Expected LORA: one expert is one plain LoRA.")
    problems = Problems(adapter.where)
    for problem in setting_problems(adapter.config):
        problems.add(problem)
    modules = _pairs(adapter.tensors, problems)
    ranks, alphas = _by_module(adapter.config, modules, problems)
    for module, (down_RI, up_OR) in modules.items():
        if {down_RI.shape[0], up_OR.shape[1]} != {ranks[module]}:
            problems.add(
                f"{module}: A {tuple(down_RI.shape)} and B {tuple(up_OR.shape)} are not of rank {ranks[module]}, which "
                "adapter_config.json gives. The two files do not belong together."
            )
    problems.raise_as(ModelError)
    rslora = bool(adapter.config.get("use_rslora", False))
    kinds = {(ranks[module], float(alphas[module]), rslora) for module in modules}
    return Lora(
        modules=modules,
        scalings={m: float(alphas[m]) / (ranks[m] ** 0.5 if rslora else ranks[m]) for m in modules},
        plain=next(iter(kinds)) if len(kinds) == 1 else None,
        base=adapter.config.get("base_model_name_or_path") or None,
        where=adapter.where,
    )


def setting_problems(config: Mapping[str, Any]) -> list[str]:
    """Returns the settings of a PEFT LoRA under which it is no plain LoRA."""
    defaults = LoraConfig().to_dict()
    found = []
    for key, value in config.items():
        if key in _READ | _WITHOUT_EFFECT or value in (None, False, "none", {}, []):
            continue
        if key not in defaults or value != defaults[key]:
            found.append(
                f"{key} = {value!r}: changes what the adapter computes. Expected plain LoRA (this setting left out); "
                "merge the adapter into a base of its own, or train a plain one."
            )
    start = str(config.get("init_lora_weights", True)).lower()
    if start.startswith(_CHANGES_BASE):
        found.append(
            f"init_lora_weights = {start!r}: this start changes the base's weights too. Convert the adapter to plain "
            "LoRA when saving it (PEFT: path_initial_model_for_weight_conversion)."
        )
    for key in ("r", "lora_alpha"):
        value = config.get(key)
        if not _above_0(value):
            found.append(f"{key} = {value!r}: expected a number above 0.")
    for key in ("rank_pattern", "alpha_pattern"):
        pattern = config.get(key) or {}
        if not isinstance(pattern, dict) or not all(map(_above_0, pattern.values())):
            found.append(f"{key} = {pattern!r}: expected numbers above 0 by name.")
    return found


def _above_0(value: Any) -> bool:
    """Whether a value from a file is a number above 0; NaN and infinity, which JSON files can hold too, are none."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and value > 0


_NAME = re.compile(r"(?P<module>.+)\.lora_(?P<side>[AB])\.weight")


def _pairs(tensors: Mapping[str, Tensor], problems: Problems) -> dict[str, tuple[Tensor, Tensor]]:
    """Returns A and B by module; what is left over or lacks its other half is a problem."""
    sides: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        match = _NAME.fullmatch(name)
        if match is None or tensor.dim() != 2:
            problems.add(f"{name} {tuple(tensor.shape)} is no matrix of a plain LoRA on a linear layer.")
            continue
        sides.setdefault(match["module"], {})[match["side"]] = tensor
    for module, halves in sides.items():
        for side in {"A", "B"} - halves.keys():
            problems.add(f"{module}.lora_{side}.weight is missing. The file is incomplete: get it anew.")
    if not tensors:
        problems.add("there is no tensor in it.")
    return {module: (halves["A"], halves["B"]) for module, halves in sides.items() if len(halves) == 2}


def _by_module(
    config: Mapping[str, Any], modules: Mapping[str, Any], problems: Problems
) -> tuple[dict[str, int], dict[str, float]]:
    """Returns rank and alpha of each module, patterns read as PEFT reads them."""
    found: list[dict[str, Any]] = []
    for pattern, default in (("rank_pattern", "r"), ("alpha_pattern", "lora_alpha")):
        given = config.get(pattern)
        given = given if isinstance(given, dict) else {}
        try:
            found.append({m: given.get(get_pattern_key(given, m), config.get(default)) for m in modules})
        except re.error as error:
            problems.add(f"{pattern}: is no regular expression ({error}).")
            found.append(dict.fromkeys(modules, config.get(default)))
    return found[0], found[1]


def _own(adapter: Adapter) -> Lora:
    """Returns one of our own single experts, as stage 1 leaves them."""
    from loramix.adapters.mixture import check_mixture  # which knows this file's Lora

    check_mixture(adapter)
    config = adapter.config
    if not (_above_0(config["r"]) and _above_0(config["lora_alpha"])):
        said = f"r = {config['r']!r}, lora_alpha = {config['lora_alpha']!r}"
        raise ModelError(f"{adapter.where}: {said}: expected numbers above 0. Get the adapter anew.")
    plain = (int(config["r"]), float(config["lora_alpha"]), bool(config.get("use_rslora", False)))
    modules = {
        name.removesuffix(".loramix_bank.A_ERI"): (
            tensor[0],
            adapter.tensors[name.removesuffix("A_ERI") + "B_EOR"][0],
        )
        for name, tensor in adapter.tensors.items()
        if name.endswith(".A_ERI")
    }
    scaling = plain[1] / (plain[0] ** 0.5 if plain[2] else plain[0])
    base = config.get("base_model_name_or_path") or None
    return Lora(modules, dict.fromkeys(modules, scaling), plain, base, adapter.where)


def lora_config(*, r: int, lora_alpha: float, use_rslora: bool, targets: list[str], base: str | None) -> dict[str, Any]:
    """Returns adapter_config.json of a plain LoRA, as PEFT writes it.

    Args:
        r, lora_alpha, use_rslora: as in PEFT.
        targets: modules, whole names or last parts.
        base: name of the base.
    """
    config = LoraConfig(
        r=r,
        lora_alpha=int(lora_alpha) if float(lora_alpha).is_integer() else lora_alpha,
        use_rslora=use_rslora,
        target_modules=targets,
        base_model_name_or_path=base,
        task_type="CAUSAL_LM",
        inference_mode=True,
    )
    content: dict[str, Any] = config.to_dict()
    content["target_modules"] = sorted(targets)
    return content


def lora_adapter(lora: Lora, targets: list[str] | None = None) -> Adapter:
    """Returns a Lora as the content of a PEFT folder.

    Args:
        lora: whose modules all have one rank, alpha and kind of scaling.
        targets: names for target_modules; all modules by their whole names by default.
    """
    assert lora.plain is not None, "one rank and alpha for all modules"
    r, alpha, rslora = lora.plain
    config = lora_config(
        r=r, lora_alpha=alpha, use_rslora=rslora, targets=targets or sorted(lora.modules), base=lora.base
    )
    tensors = {}
    for module, (down_RI, up_OR) in lora.modules.items():
        tensors[f"{module}.lora_A.weight"] = down_RI
        tensors[f"{module}.lora_B.weight"] = up_OR
    return Adapter(config, tensors, lora.where)
