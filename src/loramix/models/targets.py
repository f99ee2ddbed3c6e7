"""Which modules of a base are adapted, which share a router, and which of those comes first."""

from __future__ import annotations

import re
from collections.abc import Collection

from torch import nn

from loramix.errors import ModelError, Problems, did_you_mean
from loramix.experts.linear import linear_sizes

# Linears that read a layer's input, in the order attention runs before the feed-forward part. Modules are stored in the
# order of the constructor, which is not always the order of the forward (Phi-3 makes o_proj before qkv_proj), so the
# first of a layer is looked up here before the stored order is trusted.
READS_LAYER_INPUT = ("q_proj", "qkv_proj", "query_key_value", "c_attn", "Wqkv", "W_pack", "in_proj", "query")

_LAYER = re.compile(r"(?:^|\.)([^.\d][^.]*\.\d+)(?:\.|$)")


def layer_of(module_name: str) -> str:
    """Returns the short name of the layer a module is in, "layers.3"; "model" for a module outside any layer.

    Example:
        >>> layer_of("model.layers.3.self_attn.q_proj")
        'layers.3'
    """
    match = _LAYER.search(module_name)
    return match.group(1) if match else "model"


def doors(module_names: Collection[str]) -> dict[str, str]:
    """Returns for each layer the module its router sits at: the first adapted one that the forward reaches.

    Args:
        module_names: the adapted modules, in the order of the model.
    """
    by_layer: dict[str, list[str]] = {}
    for name in module_names:
        by_layer.setdefault(layer_of(name), []).append(name)

    def rank(name: str) -> int:
        leaf = name.rpartition(".")[2]
        return READS_LAYER_INPUT.index(leaf) if leaf in READS_LAYER_INPUT else len(READS_LAYER_INPUT)

    return {layer: min(names, key=rank) for layer, names in by_layer.items()}


def check_targets(model: nn.Module, wanted: Collection[str] | str, matched: Collection[str]) -> None:
    """Checks that every wanted target matches something and that all that is matched can be adapted.

    Args:
        model: the base.
        wanted: the targets as the user gave them: names or one regular expression.
        matched: full names of the modules they select.

    Raises:
        ModelError: with all problems and near misses.
    """
    modules = dict(model.named_modules())
    adaptable = [name for name, module in modules.items() if name and linear_sizes(module)]
    leaves = sorted({name.rpartition(".")[2] for name in adaptable})
    problems = Problems("target_modules")
    if isinstance(wanted, str):
        if not matched:
            problems.add(
                f"the expression {wanted!r} matches no module. Expected names such as {', '.join(leaves)}, or "
                f'"all-linear".{did_you_mean(wanted, leaves)}'
            )
    else:
        for target in sorted(wanted):
            if not any(name == target or name.endswith(f".{target}") for name in matched):
                problems.add(
                    f'"{target}" matches no module. Expected some of {", ".join(leaves)}.{did_you_mean(target, leaves)}'
                )
    for name in matched:
        if linear_sizes(modules[name]) is None:
            problems.add(
                f'"{name}" is a {type(modules[name]).__name__}, not a linear layer. Expected nn.Linear or Conv1D; '
                "leave it out of target_modules."
            )
    problems.raise_as(ModelError)
