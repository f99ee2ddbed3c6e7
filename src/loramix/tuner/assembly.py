"""Puts trained experts into a mixture."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from loramix.errors import ModelError, Problems
from loramix.experts import prototypes
from loramix.tuner.layer import LoramixLinear

Expert = dict[str, tuple[Tensor, Tensor]]
"""By module name: A (R, I) and B (O, R), as PEFT stores them."""


def take_expert(model: nn.Module, adapter: str, position: int = 0) -> Expert:
    """Returns copies of one expert's matrices from an adapter.

    Args:
        model: the base with the adapter on it (not the PeftModel).
        adapter: the adapter's name.
        position: the expert's position in its bank.
    """
    return {
        name: (
            module.bank(adapter).A_ERI[position].detach().clone(),
            module.bank(adapter).B_EOR[position].detach().clone(),
        )
        for name, module in model.named_modules()
        if isinstance(module, LoramixLinear) and adapter in module.loramix_bank
    }


@torch.no_grad()
def put_experts(model: nn.Module, adapter: str, experts: Mapping[str, Expert]) -> None:
    """Writes experts into the banks of an adapter, by name.

    Args:
        model: the base with the adapter on it (not the PeftModel).
        adapter: the mixture's adapter name; its config names the positions.
        experts: the matrices of each expert, for every adapted module.

    Raises:
        ModelError: an expert lacks a module, or its shapes differ; all of them at once.
    """
    layers = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, LoramixLinear) and adapter in module.loramix_bank
    }
    names = list(model.peft_config[adapter].experts)  # type: ignore[union-attr,index]
    problems = Problems("the experts of the mixture")
    for expert in names:
        for module_name, layer in layers.items():
            bank = layer.bank(adapter)
            found = experts[expert].get(module_name)
            wanted = (bank.A_ERI.shape[1:], bank.B_EOR.shape[1:])
            if found is None:
                problems.add(f"{expert}: has nothing for {module_name}. Train it with the same target_modules.")
            elif (found[0].shape, found[1].shape) != wanted:
                shapes = tuple(map(tuple, (found[0].shape, found[1].shape)))
                problems.add(f"{expert}: {module_name} has shapes {shapes}, expected {tuple(map(tuple, wanted))}.")
    problems.raise_as(ModelError)
    for position, expert in enumerate(names):
        for module_name, layer in layers.items():
            down_RI, up_OR = experts[expert][module_name]
            layer.bank(adapter).A_ERI[position] = down_RI
            layer.bank(adapter).B_EOR[position] = up_OR
    for layer in layers.values():
        if adapter in layer.loramix_router and hasattr(layer.router(adapter), "prototypes_EI"):
            layer.router(adapter).prototypes_EI.copy_(prototypes(layer.bank(adapter).A_ERI, layer.bank(adapter).B_EOR))
