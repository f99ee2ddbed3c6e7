"""Where each adapted module stands in a mixture: whose routing it follows, how many experts it has, what half it is."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from torch import nn

from loramix.errors import ConfigError
from loramix.experts import experts_per_layer
from loramix.methods import method_named
from loramix.models.targets import block_of, ffn_halves, first_of_each, is_ffn, layer_of
from loramix.tuner.config import LoramixConfig


@dataclass(frozen=True)
class Place:
    """Where a module stands.

    Attributes:
        scope: name under which its routing is kept; None where nothing is routed (one plain LoRA).
        is_door: whether the router of the scope sits here.
        num_experts: E of this module.
        half: "expand" or "contract" in a feed-forward block that is an expert as a whole; else None.
        keeps_outputs: whether a sample of its experts' outputs is kept for a loss that compares them.
    """

    scope: str | None
    is_door: bool
    num_experts: int
    half: str | None = None
    keeps_outputs: bool = False


def places(model: nn.Module, config: LoramixConfig, matched: Collection[str]) -> dict[str, Place]:
    """Returns the place of each adapted module.

    Args:
        model: the base.
        config: settings of the adapter.
        matched: names of the modules to adapt, in the order of the model.

    Raises:
        ConfigError: the allocation does not fit the base.
        ModelError: feed-forward blocks cannot be experts as a whole.
    """
    method = method_named(config.method)
    if method.router is None:
        return {name: Place(None, False, len(config.experts or [])) for name in matched}
    refuse_several_stacks(matched)
    counts = experts_by_layer(model, config)
    halves = ffn_halves(model, matched) if method.whole_ffn else {}
    routed = [name for name in matched if method.routed == "all targets" or is_ffn(name)]
    if not routed:
        raise ConfigError(
            f"method {method.name} puts its experts on feed-forward linears, but target_modules selects none. Use "
            "'all-linear' or 'ffn-linear'."
        )
    scopes = {name: scope_name(name, str(config.scope)) for name in routed}
    doors = set(first_of_each(routed, scopes.__getitem__).values())
    found = {}
    for name in matched:
        if name not in scopes:
            found[name] = Place(None, False, 1)
            continue
        found[name] = Place(
            scope=scopes[name],
            is_door=name in doors,
            num_experts=counts.get(layer_of(name), len(config.experts or [])),
            half=halves.get(name),
            keeps_outputs="contrastive" in method.losses,
        )
    return found


def refuse_several_stacks(matched: Collection[str]) -> None:
    """Raises a ConfigError if routed modules are in more than one stack of layers (two towers, encoder and decoder):
    these see different tokens, and one forward has one mask."""
    layers = {(name, layer_of(name)) for name in matched if layer_of(name) != "model"}
    stacks = {name.partition(layer)[0] + layer.rpartition(".")[0] for name, layer in layers}
    if len(stacks) > 1:
        raise ConfigError(
            f"target_modules select layers of {len(stacks)} stacks ({', '.join(sorted(stacks))}). Routers follow one "
            "stream of tokens: select the language model's layers alone, by names or by a regular expression."
        )


def scope_name(module_name: str, scope: str) -> str:
    """Returns the name of a module's scope: of itself, its block, its layer, or the model."""
    if scope == "module":
        block = block_of(module_name)
        return block + module_name.rpartition(block)[2]
    return {"block": block_of(module_name), "layer": layer_of(module_name), "model": "model"}[scope]


def experts_by_layer(model: nn.Module, config: LoramixConfig) -> dict[str, int]:
    """Returns the number of experts of each layer of the base, by the layer's short name.

    Raises:
        ConfigError: the allocation does not fit the number of layers.
    """
    layers = list(dict.fromkeys(layer_of(name) for name, _ in model.named_modules() if layer_of(name) != "model"))
    try:
        counts = experts_per_layer(config.allocation, len(config.experts or []), len(layers))
    except ValueError as error:
        raise ConfigError(str(error)) from error
    return dict(zip(layers, counts, strict=True))
