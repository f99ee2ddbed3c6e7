"""Experts of different make brought to one form, so that they can be stacked: one rank, scaling and set of modules."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch

from loramix.adapters.lora import Lora


def alike(experts: Mapping[str, Lora]) -> dict[str, Lora]:
    """Returns the experts with the same rank, scaling and modules; what each of them computes stays.

    Experts that agree already are returned bit for bit. Else: a smaller rank is filled up with zeros, which training
    leaves at zero (the gradient of each half is a product with the other); the scaling is folded into B, in fp32; a
    module that an expert lacks gets zeros.

    Args:
        experts: by name.
    """
    sizes = {m: (a.shape[1], b.shape[0]) for one in experts.values() for m, (a, b) in one.modules.items()}
    kinds = {one.plain for one in experts.values()}
    plain = kinds.pop() if len(kinds) == 1 else None
    if plain is not None and not float(plain[1]).is_integer():  # PEFT's lora_alpha is a whole number
        plain = None
    rank = max(one.rank for one in experts.values())
    shared = plain if plain is not None else (rank, float(rank), False)
    found = {}
    for name, one in experts.items():
        modules = {}
        for module, (inputs, outputs) in sizes.items():
            down_RI, up_OR = one.modules.get(module, (torch.zeros(0, inputs), torch.zeros(outputs, 0)))
            if plain is None:
                up_OR = up_OR.float() * one.scalings.get(module, 1.0)
                down_RI = down_RI.float()
            if missing := rank - down_RI.shape[0]:
                down_RI = torch.cat([down_RI, down_RI.new_zeros(missing, inputs)])
                up_OR = torch.cat([up_OR, up_OR.new_zeros(outputs, missing)], dim=1)
            modules[module] = (down_RI, up_OR)
        scaling = shared[1] / (shared[0] ** 0.5 if shared[2] else shared[0])
        found[name] = replace(one, modules=modules, scalings=dict.fromkeys(modules, scaling), plain=shared)
    return found


def short_targets(modules: list[str], linears: list[str]) -> list[str]:
    """Returns what to write as target_modules: last parts of names where these select exactly the modules, else whole
    names.

    Args:
        modules: the adapted modules.
        linears: all linear layers of the base that PEFT could match; without them whole names are returned.
    """
    leaves = {name.rpartition(".")[2] for name in modules}
    selected = {name for name in linears if name.rpartition(".")[2] in leaves}
    return sorted(leaves) if selected == set(modules) else sorted(modules)
