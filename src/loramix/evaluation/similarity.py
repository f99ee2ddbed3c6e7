"""How alike the experts of a model are: cosines between their deltas B·A, and between their As and Bs alone.

MoSLD shares A because As of different tasks are said to be alike and Bs not (Zhao et al. 2025, section 3.2, after
HydraLoRA), and leaves the picture of it to future work; this is that picture.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from loramix.tuner.layer import LoramixLinear


@dataclass(frozen=True)
class Similarity:
    """Cosines between experts, means over modules, (E, E) each; A or B is None where all experts share it."""

    BA: list[list[float]]
    A: list[list[float]] | None
    B: list[list[float]] | None


@torch.no_grad()
def similarity(model: nn.Module) -> Similarity | None:
    """Returns how alike a model's experts are; None where no module has more than one.

    Modules count that have as many experts as most parameters' modules do (an allocation may give layers different
    numbers: those with the largest number that occurs are compared). The cosine of two deltas is computed from the
    small products: <B1 A1, B2 A2> = tr((A1 A2ᵀ)(B2ᵀ B1)), so no delta is materialised.

    Args:
        model: the base with an active adapter on it.
    """
    banks = list(_banks(model))
    experts = max((e for e, _, _ in banks), default=1)
    if experts < 2:
        return None
    deltas, downs, ups = [], [], []
    for count, A_ERI, B_EOR in banks:
        if count != experts:
            continue
        A, B = A_ERI.double(), B_EOR.double()
        overlap_EEAA = torch.einsum("eri,fsi->efrs", A, A)
        overlap_EEBB = torch.einsum("eor,fos->efrs", B, B)
        deltas.append(_cosine((overlap_EEAA * overlap_EEBB).sum(dim=(2, 3)).expand(count, count)))
        if len(A) > 1:
            downs.append(_cosine(torch.einsum("eri,fri->ef", A, A)))
        if len(B) > 1:
            ups.append(_cosine(torch.einsum("eor,for->ef", B, B)))
    return Similarity(BA=_mean(deltas) or [], A=_mean(downs), B=_mean(ups))


def _banks(model: nn.Module) -> Iterator[tuple[int, Tensor, Tensor]]:
    for module in model.modules():
        if isinstance(module, LoramixLinear) and module.active_adapters:
            adapter = module.active_adapters[0]
            if adapter in module.loramix_bank:
                bank = module.bank(adapter)
                yield int(bank.num_experts), bank.A_ERI, bank.B_EOR


def _cosine(products_EE: Tensor) -> Tensor:
    """Returns cosines from inner products; 0 where an expert is zero."""
    norms_E = products_EE.diagonal().clamp_min(0).sqrt()
    return products_EE / (norms_E.unsqueeze(0) * norms_E.unsqueeze(1)).clamp_min(1e-30)


def _mean(cosines: list[Tensor]) -> list[list[float]] | None:
    if not cosines:
        return None
    rows: list[list[float]] = torch.stack(cosines).mean(dim=0).tolist()
    return [[round(value, 6) for value in row] for row in rows]
