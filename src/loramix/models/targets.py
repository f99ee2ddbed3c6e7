"""Which modules of a base are adapted, which share a router, and which of those comes first."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection

from torch import nn

from loramix.errors import ModelError, Problems, did_you_mean
from loramix.experts.linear import linear_sizes

# Linears that read a layer's input, in the order attention runs before the feed-forward part. Modules are stored in the
# order of the constructor, which is not always the order of the forward (Phi-3 makes o_proj before qkv_proj), so the
# first of a layer is looked up here before the stored order is trusted.
READS_LAYER_INPUT = ("q_proj", "qkv_proj", "query_key_value", "c_attn", "Wqkv", "W_pack", "in_proj", "query")

TARGET_WORDS = ("all-linear", "attention-linear", "ffn-linear", "qv-linear")
"""What target_modules may be beside names: groups of linear layers, whatever the base calls them."""

QUERY_VALUE = ("q_proj", "v_proj", "qkv_proj", "query_key_value", "c_attn", "Wqkv", "W_pack", "query", "value")
"""Query and value projections; where a base has them fused with the key, the fused one."""

FFN_LAYOUTS: tuple[tuple[frozenset[str], frozenset[str]], ...] = (
    (frozenset({"gate_proj", "up_proj"}), frozenset({"down_proj"})),
    (frozenset({"gate_up_proj"}), frozenset({"down_proj"})),
    (frozenset({"w1", "w3"}), frozenset({"w2"})),
    (frozenset({"w1", "w2"}), frozenset({"c_proj"})),
    (frozenset({"c_fc"}), frozenset({"c_proj"})),
    (frozenset({"fc1"}), frozenset({"fc2"})),
    (frozenset({"fc_in"}), frozenset({"fc_out"})),
    (frozenset({"up_proj"}), frozenset({"down_proj"})),
    (frozenset({"dense_h_to_4h"}), frozenset({"dense_4h_to_h"})),
)
"""Feed-forward blocks that work element by element between their first linears and their last."""

_LAYER = re.compile(r"(?:^|\.)([^.\d][^.]*\.\d+)(?:\.|$)")


def layer_of(module_name: str) -> str:
    """Returns the short name of the layer a module is in, "layers.3"; "model" for a module outside any layer.

    Example:
        >>> layer_of("model.layers.3.self_attn.q_proj")
        'layers.3'
    """
    match = _LAYER.search(module_name)
    return match.group(1) if match else "model"


def block_of(module_name: str) -> str:
    """Returns the short name of the block a module is in, "layers.3.mlp"; the layer's for a module directly in it.

    Example:
        >>> block_of("model.layers.3.self_attn.q_proj")
        'layers.3.self_attn'
    """
    layer = layer_of(module_name)
    _, found, rest = module_name.rpartition(layer + ".")
    inside = rest.split(".")
    return f"{layer}.{inside[0]}" if found and len(inside) > 1 else layer


def is_ffn(module_name: str) -> bool:
    """Whether a module is in a feed-forward block."""
    if block_of(module_name) == layer_of(module_name):  # OPT has fc1 and fc2 in the layer itself
        leaf = module_name.rpartition(".")[2]
        return any(leaf in first | last for first, last in FFN_LAYOUTS)
    block = block_of(module_name).rpartition(".")[2]
    return any(word in block for word in ("mlp", "ffn", "feed_forward", "moe"))


def in_group(module_name: str, word: str) -> bool:
    """Whether a linear layer belongs to one of TARGET_WORDS."""
    if word == "qv-linear":
        return module_name.rpartition(".")[2] in QUERY_VALUE and not is_ffn(module_name)
    attention = any(part in block_of(module_name) for part in ("attn", "attention"))
    return {"all-linear": True, "attention-linear": attention, "ffn-linear": is_ffn(module_name)}[word]


def first_of_each(module_names: Collection[str], scope_of: Callable[[str], str]) -> dict[str, str]:
    """Returns for each scope the module its router sits at: the first adapted one that the forward reaches.

    Args:
        module_names: the adapted modules, in the order of the model.
        scope_of: the scope of a module, by its name.
    """
    by_scope: dict[str, list[str]] = {}
    for name in module_names:
        by_scope.setdefault(scope_of(name), []).append(name)
    first_layer = {scope: layer_of(names[0]) for scope, names in by_scope.items()}

    def rank(scope: str, name: str) -> tuple[bool, int]:
        leaf = name.rpartition(".")[2]
        at = READS_LAYER_INPUT.index(leaf) if leaf in READS_LAYER_INPUT else len(READS_LAYER_INPUT)
        return layer_of(name) != first_layer[scope], at

    return {scope: min(names, key=lambda name: rank(scope, name)) for scope, names in by_scope.items()}


def ffn_halves(model: nn.Module, module_names: Collection[str]) -> dict[str, str]:
    """Returns "expand" or "contract" for each adapted module of the feed-forward blocks.

    Raises:
        ModelError: a block whose layout is not known, or of which only a part is adapted.
    """
    blocks: dict[str, list[str]] = {}
    for name in module_names:
        if is_ffn(name):
            blocks.setdefault(name.rpartition(".")[0], []).append(name)
    halves: dict[str, str] = {}
    problems = Problems("feed-forward blocks as experts")
    for parent, names in blocks.items():
        leaves = {name.rpartition(".")[2] for name in names}
        inside = {
            child
            for child, module in model.get_submodule(parent).named_modules()
            if linear_sizes(module) and not child.endswith(".base_layer")  # under an adapter that is on it already
        }
        layout = next(((first, last) for first, last in FFN_LAYOUTS if first | last == inside), None)
        if layout is None:
            problems.add(
                f"{parent} holds {', '.join(sorted(inside))}: an unknown feed-forward layout, so it cannot be an "
                "expert as a whole. Adapt attention only (target_modules = 'attention-linear') with mola, for example."
            )
        elif leaves != inside:
            problems.add(
                f"{parent}: only {', '.join(sorted(leaves))} is adapted. Expected {', '.join(sorted(inside))}."
            )
        else:
            halves.update({n: "expand" if n.rpartition(".")[2] in layout[0] else "contract" for n in names})
    if not blocks:
        problems.add("no linear layer of a feed-forward block is adapted. Use target_modules = 'all-linear'.")
    problems.raise_as(ModelError)
    return halves


def refuse_moe_blocks(model: nn.Module, word: str | None, module_names: Collection[str]) -> None:
    """Raises a ModelError if the adaptation reaches for blocks that are mixtures of experts already.

    Args:
        model: the base.
        word: the one of TARGET_WORDS that was asked for, if any. Expert weights are often bare parameters that no word
            can select, so a word that means the feed-forward blocks is refused, rather than half obeyed.
        module_names: what the targets select.
    """
    mixtures = {name.partition(".experts")[0] for name, _ in model.named_modules() if ".experts" in name}
    mixtures |= {
        name.rpartition(".")[0]
        for name, parameter in model.named_parameters()
        if is_ffn(name) and parameter.dim() == 3 and ".loramix_" not in name  # an adapter's banks are on it already
    }
    inside = sorted({name for name in module_names if any(name.startswith(f"{mixture}.") for mixture in mixtures)})
    if not mixtures or not (inside or word in ("all-linear", "ffn-linear")):
        return
    about = f"{inside[0]} is in one of its" if inside else f"{min(mixtures)} is one of its"
    raise ModelError(
        f"the base is a mixture of experts itself: {about} expert blocks, whose weights are no plain linear layers and "
        "whose tokens are routed already. Linear layers outside of these blocks can be adapted, in most bases its "
        "attention: set target_modules = 'attention-linear'."
    )


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
