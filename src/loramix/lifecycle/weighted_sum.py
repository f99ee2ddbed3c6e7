"""A fixed weighted sum of experts as one LoRA: exact at the sum of their ranks, or the nearest of a smaller rank.

    sum_e w_e s_e B_e A_e  =  [w_1 s_1 B_1 | w_2 s_2 B_2 | ...] [A_1; A_2; ...]

Each expert's weight and scaling go into its B; A stays bit for bit, and the new LoRA's own scaling is 1 (lora_alpha is
r). All is computed in fp64 and rounded once, to fp32, when it is stored. The O x I matrix is never made: with thin QRs
of both sides, Q_B R_B (Q_A R_A)^T, singular values and norms are those of the small R_B R_A^T.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from loramix.adapters.lora import Lora

Pair = tuple[Tensor, Tensor]
"""A (R, I) and B (O, R)."""


def concatenated(experts: Mapping[str, Lora], weights: Mapping[str, float]) -> Lora:
    """Returns sum_e w_e s_e B_e A_e as one LoRA, in fp64; experts of weight 0 take no rank.

    Args:
        experts: by name, all on the same modules.
        weights: by name, one of them not 0.
    """
    chosen = {name: expert for name, expert in experts.items() if weights.get(name)}
    first = next(iter(chosen.values()))
    modules = {}
    for module in first.modules:
        downs = [expert.modules[module][0].double() for expert in chosen.values()]
        ups = [weights[name] * one.scalings[module] * one.modules[module][1].double() for name, one in chosen.items()]
        modules[module] = (torch.cat(downs), torch.cat(ups, dim=1))
    return _plain(first, modules)


def summed_matrices(experts: Mapping[str, Lora], weights: Mapping[str, float]) -> Lora:
    """Returns s (sum_e w_e B_e)(sum_e w_e A_e), LoRAHub's mixture, as one LoRA of the experts' rank, in fp64.

    Args:
        experts: by name, all of one rank, scaling and set of modules.
        weights: by name; may be negative.
    """
    first = next(iter(experts.values()))
    modules = {}
    for module, scaling in first.scalings.items():
        downs = [weights[name] * one.modules[module][0].double() for name, one in experts.items()]
        ups = [weights[name] * one.modules[module][1].double() for name, one in experts.items()]
        modules[module] = (torch.stack(downs).sum(dim=0), scaling * torch.stack(ups).sum(dim=0))
    return _plain(first, modules)


def truncated(lora: Lora, rank: int) -> Lora:
    """Returns the LoRA of a rank that is nearest to another in the Frobenius norm, module by module, in fp64.

    Singular values are shared evenly: A gets sqrt(S) V^T, B gets U sqrt(S).

    Args:
        lora: of scaling 1.
        rank: of the new one.
    """
    modules = {}
    for module, (down_RI, up_OR) in lora.modules.items():
        outer_OR, core_up = torch.linalg.qr(up_OR.double())
        outer_IR, core_down = torch.linalg.qr(down_RI.double().T)
        left, values, right = torch.linalg.svd(core_up @ core_down.T)
        kept = min(rank, len(values))
        roots = values[:kept].sqrt()
        up, down = outer_OR @ left[:, :kept] * roots, (outer_IR @ right[:kept].T * roots).T
        if missing := rank - kept:  # a module smaller than the rank
            up = torch.cat([up, up.new_zeros(len(up), missing)], dim=1)
            down = torch.cat([down, down.new_zeros(missing, down.shape[1])])
        modules[module] = (down.contiguous(), up.contiguous())
    return _plain(lora, modules)


def stored(lora: Lora) -> Lora:
    """Returns a LoRA in fp32, as it is written."""
    return replace(lora, modules={m: (a.float(), b.float()) for m, (a, b) in lora.modules.items()})


def _plain(like: Lora, modules: dict[str, Pair]) -> Lora:
    rank = next(iter(modules.values()))[0].shape[0]
    return replace(like, modules=modules, scalings=dict.fromkeys(modules, 1.0), plain=(rank, float(rank), False))


@dataclass(frozen=True)
class Deviation:
    """How far one LoRA is from another, ||found - wanted||_F / ||wanted||_F.

    Attributes:
        overall: over all modules together.
        worst: of the module where it is largest.
        worst_module: its name.
    """

    overall: float
    worst: float
    worst_module: str

    def as_dict(self) -> dict[str, Any]:
        """Returns it for JSON."""
        return asdict(self)


def deviation(found: Lora, wanted: Lora) -> Deviation:
    """Returns how far the delta of one LoRA is from that of another, on the same modules."""
    distances, sizes = {}, {}
    for module, (down_RI, up_OR) in wanted.modules.items():
        wanted_up = wanted.scalings[module] * up_OR.double()
        found_down, found_up = found.modules[module]
        both = torch.cat([found.scalings[module] * found_up.double(), -wanted_up], dim=1)
        distances[module] = norm(torch.cat([found_down.double(), down_RI.double()]), both)
        sizes[module] = norm(down_RI.double(), wanted_up)
    return deviation_of(distances, sizes)


def deviation_of(distances: Mapping[str, float], sizes: Mapping[str, float]) -> Deviation:
    """Returns the deviation from distances and sizes by module; where nothing was wanted, any distance is infinite."""
    relative = {m: d / sizes[m] if sizes[m] else (float("inf") if d else 0.0) for m, d in distances.items()}
    worst = max(relative, key=lambda module: relative[module])
    whole = sum(size**2 for size in sizes.values()) ** 0.5
    overall = sum(d**2 for d in distances.values()) ** 0.5 / whole if whole else relative[worst]
    return Deviation(overall, relative[worst], worst)


def norm(down_RI: Tensor, up_OR: Tensor) -> float:
    """Returns ||B A||_F."""
    core_up, core_down = torch.linalg.qr(up_OR, mode="r").R, torch.linalg.qr(down_RI.T, mode="r").R
    return float(torch.linalg.matrix_norm(core_up @ core_down.T))
