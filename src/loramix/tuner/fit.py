"""Whether an adapter's settings fit a base; known before anything is built or written."""

from __future__ import annotations

import copy
import re

from peft.tuners.tuners_utils import _maybe_include_all_linear_layers, check_target_module_exists
from torch import nn

from loramix.errors import ModelError
from loramix.models.targets import TARGET_WORDS, check_targets, in_group, layer_of, refuse_moe_blocks
from loramix.tuner.config import LoramixConfig
from loramix.tuner.decisions import last_scope_needed
from loramix.tuner.layer import LoramixLinear
from loramix.tuner.places import places


def matched_modules(model: nn.Module, config: LoramixConfig) -> list[str]:
    """Returns the full names of the modules that the settings select, in the order of the model.

    `config.target_modules` is resolved in place where it is a word such as "all-linear", as PEFT does.

    Raises:
        ModelError: a target matches nothing, or something that cannot be adapted; all of it together.
    """
    wanted = config.target_modules or "all-linear"
    by_word = wanted if isinstance(wanted, str) and wanted in TARGET_WORDS else None
    config.target_modules = "all-linear" if by_word else wanted
    _maybe_include_all_linear_layers(config, model)
    try:
        matched = [
            name
            for name, _ in model.named_modules()
            if name and not _inside_adapter(model, name) and check_target_module_exists(config, name)
        ]
    except re.error as error:
        raise ModelError(f"target_modules or exclude_modules is no regular expression: {error}.") from error
    if by_word:
        # PEFT takes whole names as they are and does not look at their layer, so the layers are picked here.
        wanted_layers = None if config.layers_to_transform is None else _as_set(config.layers_to_transform)
        matched = [
            name
            for name in matched
            if in_group(name, by_word) and (wanted_layers is None or _layer_number(name) in wanted_layers)
        ]
        config.target_modules = set(matched)  # type: ignore[assignment]
    check_targets(model, matched if by_word else wanted, matched)
    refuse_moe_blocks(model, by_word, matched)
    if not matched:
        numbers = sorted({n for name, _ in model.named_modules() if (n := _layer_number(name)) is not None})
        raise ModelError(
            f"target_modules = {wanted!r} with layers_to_transform = {config.layers_to_transform} and exclude_modules "
            f"= {config.exclude_modules} selects no module. The base has layers {numbers[0]} to {numbers[-1]}."
            if numbers
            else "target_modules selects no module. Name linear layers of the base."
        )
    return matched


def _as_set(layers: list[int] | int) -> set[int]:
    return {layers} if isinstance(layers, int) else set(layers)


def _layer_number(name: str) -> int | None:
    number = layer_of(name).rpartition(".")[2]
    return int(number) if number.isdigit() else None


def check_fit(model: nn.Module, config: LoramixConfig) -> None:
    """Checks targets, allocation and decision against a base, and leaves all as they are.

    Args:
        model: the base; its weights may be on the meta device.
        config: settings of the adapter.

    Raises:
        ModelError: the targets do not fit.
        ConfigError: the allocation does not fit, or the decision names a layer without router.
    """
    found = places(model, config, matched_modules(model, copy.copy(config)))
    if config.decision not in (None, "pinned"):
        last_scope_needed(str(config.decision), [str(place.scope) for place in found.values() if place.is_door])


def _inside_adapter(model: nn.Module, name: str) -> bool:
    """Whether a module is a part of an adapted layer (its frozen layer, a bank), not a target itself."""
    parent = name.rpartition(".")[0]
    while parent:
        if isinstance(model.get_submodule(parent), LoramixLinear):
            return True
        parent = parent.rpartition(".")[0]
    return False
