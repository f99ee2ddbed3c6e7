"""Experts merged by PEFT's own `add_weighted_adapter`: linear, TIES, DARE, magnitude pruning.

Nothing of these is written anew. The experts go to PEFT as ordinary LoRA folders, what PEFT makes of them comes back.
All but the `..._svd` kinds merge A and B by themselves: the product of the merged halves has cross terms, so that even
`linear` is not the weighted sum of the experts. They need experts of one rank; those of a mixture are.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel

from loramix.adapters.adapter import read_adapter, write_adapter
from loramix.adapters.lora import Lora, as_lora, lora_adapter
from loramix.errors import ConfigError

COMBINATIONS = (
    "linear",
    "ties",
    "dare_linear",
    "dare_ties",
    "magnitude_prune",
    "ties_svd",
    "dare_linear_svd",
    "dare_ties_svd",
    "magnitude_prune_svd",
)


@dataclass(frozen=True)
class Combination:
    """How PEFT is to merge.

    Attributes:
        kind: one of COMBINATIONS.
        density: share of values kept; None for linear.
        rank: of the result, for the `..._svd` kinds; the experts' own by default.
        seed: of DARE's pruning.
    """

    kind: str
    density: float | None = None
    rank: int | None = None
    seed: int = 0

    @property
    def is_random(self) -> bool:
        return self.kind.startswith("dare")


def combined(base: Any, experts: Mapping[str, Lora], weights: Mapping[str, float], how: Combination) -> Lora:
    """Returns what PEFT makes of the experts.

    Args:
        base: the model they are for; it is altered and of no use afterwards.
        experts: by name, each of one rank and scaling over all modules.
        weights: by name; experts of weight 0 are left out.
        how: see `Combination`.

    Raises:
        ConfigError: the rank is higher than a module is wide.
    """
    widths = [min(down.shape[1], up.shape[0]) for lora in experts.values() for down, up in lora.modules.values()]
    if how.rank is not None and how.rank > min(widths):
        raise ConfigError(
            f"--rank {how.rank}: the narrowest module is {min(widths)} wide, and PEFT's {how.kind} can give it no "
            f"higher rank. Lower --rank to {min(widths)} or less, or leave --combination out."
        )
    names = [name for name in experts if weights.get(name)]
    # PEFT's adapter names are names of modules; an expert's may hold dots.
    adapters = [f"expert_{number}" for number in range(len(names))]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for adapter, name in zip(adapters, names, strict=True):
            write_adapter(lora_adapter(without_rslora(experts[name])), folder / adapter)
        model = PeftModel.from_pretrained(base, str(folder / adapters[0]), adapter_name=adapters[0])
        for adapter in adapters[1:]:
            model.load_adapter(str(folder / adapter), adapter_name=adapter)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(how.seed)
            model.base_model.add_weighted_adapter(
                adapters,
                [weights[name] for name in names],
                "merged",
                combination_type=how.kind,
                svd_rank=how.rank,
                svd_full_matrices=False,
                density=how.density,
            )
        model.save_pretrained(str(folder), selected_adapters=["merged"], save_embedding_layers=False)
        found = as_lora(read_adapter(folder / "merged"))
    first = experts[names[0]]
    return replace(found, base=first.base, where=f"{how.kind} of {', '.join(names)}")


def without_rslora(lora: Lora) -> Lora:
    """Returns the same LoRA with an ordinary lora_alpha.

    PEFT (0.21) gives the merged adapter lora_alpha = r, meant as scaling 1, and keeps the first one's use_rslora, under
    which the scaling is sqrt(r).
    """
    assert lora.plain is not None, "one rank and alpha for all modules"
    rank, _, rslora = lora.plain
    if not rslora:
        return lora
    return replace(lora, plain=(rank, next(iter(lora.scalings.values())) * rank, False))
