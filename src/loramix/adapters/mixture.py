"""A loramix adapter as file content: checked against itself, its experts taken out, added, dropped and renamed.

No base is needed: the tensors are rows of stacked experts and of routers, so an edit moves rows and touches nothing
else. What an edit does not name stays bit for bit.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor

from loramix.adapters.adapter import Adapter
from loramix.adapters.lora import Lora
from loramix.data.domains import name_problem
from loramix.errors import ConfigError, ModelError, Problems, did_you_mean
from loramix.methods import Method, method_named
from loramix.models.targets import is_ffn
from loramix.tuner import LoramixConfig
from loramix.tuner.abstaining import BASE
from loramix.tuner.config import SCHEMA_VERSION
from loramix.tuner.places import scope_name

_NAME = re.compile(r"(?P<module>.+)\.loramix_(?P<part>bank|router)\.(?P<rest>[\w.]+)")


def check_mixture(adapter: Adapter) -> LoramixConfig:
    """Returns the settings of a loramix adapter whose two files belong together and are whole.

    Raises:
        ModelError: a newer file format, unknown settings, unusable names, a bank or router that is missing, left over,
            or of other numbers than the settings say. All at once.
    """
    problems = Problems(adapter.where)
    version = adapter.config.get("schema_version", 1)
    if not isinstance(version, int) or version > SCHEMA_VERSION:
        raise ModelError(
            f"{adapter.where}: schema_version = {version!r}: written by a newer loramix; this one reads up to "
            f"{SCHEMA_VERSION}. Upgrade loramix."
        )
    known = {one.name for one in fields(LoramixConfig)}
    for key in adapter.config.keys() - known:
        problems.add(f"{key}: no setting of a loramix adapter.{did_you_mean(key, known)}")
    for name in adapter.config.get("experts") or []:
        if not isinstance(name, str) or name_problem(name):
            problems.add(f"experts: {str(name)[:40]!r} is no name. Expected letters, digits, spaces or _ . + -.")
    problems.raise_as(ModelError)
    try:
        config = LoramixConfig(**{k: v for k, v in adapter.config.items() if k != "peft_type"})
    except (ConfigError, TypeError, ValueError) as error:
        raise ModelError(f"{adapter.where}: {error}") from error
    _check_tensors(adapter, config, problems)
    problems.raise_as(ModelError)
    return config


def _check_tensors(adapter: Adapter, config: LoramixConfig, problems: Problems) -> None:
    """Adds what is wrong with the tensors by their names and shapes."""
    method = method_named(config.method)
    banks, routers = _parts(adapter.tensors, problems)
    count = len(config.experts or [])
    for module, bank in banks.items():
        for half in {"A_ERI", "B_EOR"} - bank.keys():
            problems.add(f"{module}: {half} is missing. The file is incomplete: get it anew.")
        routed = method.router is not None and (method.routed == "all targets" or is_ffn(module))
        rank, most = (config.rank, count) if routed or method.router is None else (int(config.r or 0), 1)
        if len(bank) == 2:
            found = bank["A_ERI"].shape[1], bank["B_EOR"].shape[2]
            if set(found) != {rank}:
                problems.add(f"{module}: experts of rank {found}, adapter_config.json says {rank}.")
            stacked = max(bank["A_ERI"].shape[0], bank["B_EOR"].shape[0])
            if stacked > most or (stacked < most and config.allocation in (None, "uniform")):
                problems.add(f"{module}: {stacked} experts, adapter_config.json names {most}.")
    if not banks:
        problems.add("there is no expert in it.")
    _check_routers(method, config, banks, routers, problems)


def _check_routers(
    method: Method, config: LoramixConfig, banks: Mapping[str, Any], routers: Mapping[str, Any], problems: Problems
) -> None:
    if method.router is None:
        for module in routers:
            problems.add(f"{module}: has a router, but method {method.name} routes nothing.")
        return
    routed = [module for module in banks if method.routed == "all targets" or is_ffn(module)]
    doors: dict[str, list[str]] = {scope_name(module, str(config.scope)): [] for module in routed}
    for module in routers:
        doors.setdefault(scope_name(module, str(config.scope)), []).append(module)
    for scope, found in doors.items():
        if len(found) != 1:
            problems.add(f"{scope}: {len(found) or 'no'} routers, expected one. The file is incomplete: get it anew.")
    sets = {frozenset(p for p in parts if not p.startswith("abstention.")) for parts in routers.values()}
    if len(sets) > 1:
        problems.add(f"routers of different make: {', '.join(sorted('+'.join(sorted(s)) for s in sets))}.")
    calibrated = sum(any(p.startswith("abstention.") for p in parts) for parts in routers.values())
    if calibrated != (config.abstention is not None):
        problems.add(
            f"abstention: calibrated at {calibrated} routers, adapter_config.json says "
            f"{'one' if config.abstention is not None else 'none'}. The two files do not belong together."
        )


def _parts(
    tensors: Mapping[str, Tensor], problems: Problems
) -> tuple[dict[str, dict[str, Tensor]], dict[str, dict[str, Tensor]]]:
    """Returns banks and routers, each by module and tensor name."""
    parts: dict[str, dict[str, dict[str, Tensor]]] = {"bank": {}, "router": {}}
    for name, tensor in tensors.items():
        match = _NAME.fullmatch(name)
        if match is None or (match["part"] == "bank" and match["rest"] not in ("A_ERI", "B_EOR")):
            problems.add(f"{name} is not used by a loramix adapter.")
        elif match["part"] == "bank" and tensor.dim() != 3:
            problems.add(f"{name}: shape {tuple(tensor.shape)}, expected three dimensions: experts, and a matrix each.")
        else:
            parts[match["part"]].setdefault(match["module"], {})[match["rest"]] = tensor
    return parts["bank"], parts["router"]


def position_of(config: LoramixConfig, name: str) -> int:
    """Returns where an expert stands among the others.

    Raises:
        ConfigError: there is no such expert.
    """
    names = list(config.experts or [])
    if name not in names:
        raise ConfigError(f"{name!r}: no such expert. Expected one of {', '.join(names)}.{did_you_mean(name, names)}")
    return names.index(name)


def whole_experts_problem(config: LoramixConfig) -> str | None:
    """Returns why the experts of a mixture are no adapters by themselves, or None where each is one."""
    method = method_named(config.method)
    if method.expert_count == "chosen" or method.whole_ffn or config.bank_config().share is not None:
        return (
            f"method {config.method} {'shares matrices between experts and ' if config.bank_config().share else ''}"
            "routes each token: none of its experts answers alone, so none is an adapter by itself. Methods with one "
            "expert per domain (moa, moe-lora, mole, arrow, lorahub) have such experts."
        )
    return None


def take_lora(adapter: Adapter, config: LoramixConfig, name: str) -> Lora:
    """Returns one expert of a mixture as a plain LoRA ("Single-LoRA of MoA", Feng et al., Table 8).

    Raises:
        ConfigError: no such expert, or the method's experts are none by themselves.
    """
    position = position_of(config, name)
    if problem := whole_experts_problem(config):
        raise ConfigError(problem)
    banks, _ = _parts(adapter.tensors, Problems(adapter.where))
    modules = {
        module: (bank["A_ERI"][position].clone(), bank["B_EOR"][position].clone()) for module, bank in banks.items()
    }
    plain = (int(config.r or 0), float(config.lora_alpha or 0), config.use_rslora)
    base = adapter.config.get("base_model_name_or_path")
    return Lora(modules, dict.fromkeys(modules, config.scaling), plain, base, f"expert {name} of {adapter.where}")


def router_tensors(adapter: Adapter) -> dict[str, Tensor]:
    """Returns the tensors of the routers, by their whole names."""
    return {name: tensor for name, tensor in adapter.tensors.items() if ".loramix_router." in name}


def stacked(experts: Mapping[str, Lora]) -> dict[str, Tensor]:
    """Returns the banks of experts that are alike, by the names a loramix adapter gives them."""
    names = list(experts)
    found = {}
    for module in experts[names[0]].modules:
        found[f"{module}.loramix_bank.A_ERI"] = torch.stack([experts[n].modules[module][0] for n in names])
        found[f"{module}.loramix_bank.B_EOR"] = torch.stack([experts[n].modules[module][1] for n in names])
    return found


def renamed(adapter: Adapter, old: str, new: str) -> Adapter:
    """Returns the mixture with an expert under another name.

    Raises:
        ConfigError: no such expert, or a name that cannot be one or is taken.
    """
    config = check_mixture(adapter)
    names = list(config.experts or [])
    position = position_of(config, old)
    if problem := new_name_problem(config, new):
        raise ConfigError(problem)
    names[position] = new
    changed = {**adapter.config, "experts": names}
    if adapter.config.get("domains"):
        changed["domains"] = [new if name == old else name for name in adapter.config["domains"]]
    return replace(adapter, config=changed)


def new_name_problem(config: LoramixConfig, name: str) -> str | None:
    """Returns why an expert cannot be called so, or None."""
    if wrong := name_problem(name):
        return wrong
    if name == BASE:
        return f"{name!r} stands for the base alone. Choose another name."
    if name in (config.experts or []):
        return f"{name!r} is taken. Experts: {', '.join(config.experts or [])}. Choose another name."
    return None
