"""A trained mixture with one expert more, or one less; what the others compute stays bit for bit.

An expert that joins brings hidden units of its own to each router, and one output. The old outputs do not see the new
units (zeros), so the old experts' scores, and their order among themselves, are what they were; only the new score is
learned. Taking the expert out again drops its rows and gives back the file as it was.

    w_in (H, I)   -> rows of the new units at the end
    w_out (E, H)  -> [[w_out, 0], [the new expert's row]]
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from loramix.adapters.adapter import Adapter
from loramix.adapters.lora import Lora
from loramix.adapters.mixture import check_mixture, new_name_problem, position_of, whole_experts_problem
from loramix.errors import ConfigError, LoramixError, ModelError, Problems
from loramix.experts import prototypes
from loramix.methods import method_named
from loramix.routers.sequence import ADDED_UNITS, SequenceRouter, SequenceRouterConfig
from loramix.tuner import LoramixConfig

_MEANS = ".abstention.means_ED"
Score = tuple[Tensor, Tensor]
"""What a new expert adds to one router: w_in rows (ADDED_UNITS, I) and its row of w_out (H + ADDED_UNITS,)."""


def growth_problem(config: LoramixConfig) -> str | None:
    """Returns why no expert can join or leave a mixture, or None."""
    if method_named(config.method).router is None:
        return (
            f"method {config.method} has one expert and routes nothing. Compose experts with `loramix experts import`."
        )
    if config.method not in ("moa", "arrow"):
        return whole_experts_problem(config) or (
            f"method {config.method}: its routing is learned for all experts together. Train it anew with the expert, "
            "or use moa or arrow, which experts can join."
        )
    return None


def with_expert(
    adapter: Adapter, name: str, expert: Lora, scores: Mapping[str, Score], mean_D: Tensor | None = None
) -> Adapter:
    """Returns a mixture with one more expert, at the end.

    Args:
        adapter: a mixture of method moa or arrow.
        name: of the new expert.
        expert: of the mixture's rank and scaling, on the same modules.
        scores: for moa: what it adds to each router, by the module that the router sits at.
        mean_D: for a mixture that is calibrated to abstain: where the new domain lies (routers/abstention.py).

    Raises:
        ConfigError: the method's mixtures do not grow, or the name cannot be used.
        ModelError: the expert does not fit the mixture.
    """
    config = check_mixture(adapter)
    if problem := growth_problem(config) or new_name_problem(config, name):
        raise ConfigError(problem)
    _check_alike(adapter, config, expert)
    tensors = dict(adapter.tensors)
    for module, (down_RI, up_OR) in expert.modules.items():
        for half, matrix in (("A_ERI", down_RI), ("B_EOR", up_OR)):
            key = f"{module}.loramix_bank.{half}"
            tensors[key] = torch.cat([tensors[key], matrix[None].to(tensors[key].dtype)])
    changed = _with_count(adapter.config, [*(config.experts or []), name])
    if config.method == "arrow":
        for module, (down_RI, up_OR) in expert.modules.items():
            key = f"{module}.loramix_router.prototypes_EI"
            if key in tensors:
                tensors[key] = torch.cat([tensors[key], prototypes(down_RI[None], up_OR[None]).to(tensors[key].dtype)])
        return replace(adapter, config=changed, tensors=tensors)
    settings = SequenceRouterConfig(**adapter.config["router"])
    for door, score in scores.items():
        inner, outer = f"{door}.loramix_router.w_in_HI", f"{door}.loramix_router.w_out_EH"
        router = SequenceRouter(settings, tensors[inner].shape[1], len(config.experts or []))
        router.load_state_dict({"w_in_HI": tensors[inner], "w_out_EH": tensors[outer]})
        grown = router.with_expert(*score).state_dict()
        tensors[inner], tensors[outer] = grown["w_in_HI"], grown["w_out_EH"]
    for key in [key for key in tensors if key.endswith(_MEANS)]:
        assert mean_D is not None, "a calibrated mixture must know where the new domain lies"
        tensors[key] = torch.cat([tensors[key], mean_D[None].to(tensors[key].dtype)])
    changed["router"] = {**adapter.config["router"], "added": settings.added + 1}
    return replace(adapter, config=changed, tensors=tensors)


def without_expert(adapter: Adapter, name: str) -> Adapter:
    """Returns a mixture without one of its experts.

    Its hidden units go with it where no other expert's score uses them; else they stay.

    Raises:
        ConfigError: the method's mixtures do not shrink, no such expert, or fewer than two would be left.
    """
    config = check_mixture(adapter)
    names = list(config.experts or [])
    position = position_of(config, name)
    if problem := growth_problem(config):
        raise ConfigError(problem)
    left = [one for one in names if one != name]
    if len(left) < 2:
        raise ConfigError(
            f"{name}: without it {left[0]} alone is left, which is no mixture. Use `loramix experts extract` to keep "
            "that one as a LoRA."
        )
    kept = torch.tensor([e for e in range(len(names)) if e != position])
    tensors = {key: t[kept] if _by_expert(key) else t for key, t in adapter.tensors.items()}
    changed = _with_count(adapter.config, left)
    if config.method == "moa":
        tensors, changed["router"] = _routers_without(tensors, dict(changed["router"]), position, len(names))
    result = replace(adapter, config=changed, tensors=tensors)
    try:
        check_mixture(result)
    except LoramixError as error:
        said = f"{name}: what is left without it would be no mixture; nothing was changed. {error}"
        raise ConfigError(said) from error
    return result


def _by_expert(key: str) -> bool:
    """Whether the first dimension of a tensor counts experts."""
    return key.endswith((".A_ERI", ".B_EOR", ".prototypes_EI", ".w_out_EH", _MEANS))


def _with_count(config: Mapping[str, Any], names: list[str]) -> dict[str, Any]:
    return {**config, "experts": names, "num_experts": len(names)}


def _routers_without(
    tensors: dict[str, Tensor], router: dict[str, Any], position: int, count: int
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Returns tensors and settings of routers after the expert's output is gone: its own units are dropped, or handed
    to the first experts, or there were none."""
    settings = SequenceRouterConfig(**router)
    added = settings.added
    first = settings.width(count) - ADDED_UNITS * added
    if position < count - added:  # of the first experts: their units serve all
        if count - 1 == added:  # the last of them: whoever is left counts as first, with all units there are
            return tensors, {**router, "hidden_size": settings.width(count), "added": 0}
        return tensors, {**router, "hidden_size": first}
    start = first + ADDED_UNITS * (position - (count - added))
    own, width = range(start, start + ADDED_UNITS), settings.width(count)
    used = any(bool(t[:, start : start + ADDED_UNITS].any()) for k, t in tensors.items() if k.endswith(".w_out_EH"))
    others = [unit for unit in range(width) if unit not in own]
    order = torch.tensor([*others[:first], *own, *others[first:]] if used else others)
    inner = {key: t[order] for key, t in tensors.items() if key.endswith(".w_in_HI")}
    outer = {key: t[:, order] for key, t in tensors.items() if key.endswith(".w_out_EH")}
    changed = {**tensors, **inner, **outer}
    rest: dict[str, Any] = {**router, "added": added - 1}
    if used:
        rest["hidden_size"] = first + ADDED_UNITS
    return changed, rest


def _check_alike(adapter: Adapter, config: LoramixConfig, expert: Lora) -> None:
    problems = Problems(expert.where)
    wanted = (int(config.r or 0), float(config.lora_alpha or 0), config.use_rslora)
    if expert.plain != wanted:
        problems.add(f"(r, lora_alpha, use_rslora) = {expert.plain}, the mixture has {wanted}. Train it with the same.")
    banks = {k.removesuffix(".loramix_bank.A_ERI") for k in adapter.tensors if k.endswith(".loramix_bank.A_ERI")}
    for module in sorted(banks ^ expert.modules.keys()):
        problems.add(f"{module}: adapted by {'the mixture' if module in banks else 'the expert'} alone.")
    for module in banks & expert.modules.keys():
        for half, matrix in zip(("A_ERI", "B_EOR"), expert.modules[module], strict=True):
            shape = tuple(adapter.tensors[f"{module}.loramix_bank.{half}"].shape[1:])
            if tuple(matrix.shape) != shape:
                problems.add(f"{module}: {half} {tuple(matrix.shape)}, the mixture has {shape}.")
    problems.raise_as(ModelError)
