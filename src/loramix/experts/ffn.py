"""Experts that are whole feed-forward blocks (MixLoRA), with the frozen matrices run once.

    E_e(x) = W_d' (act(W_g' x) * (W_u' x)),    W' = W + s B_e A_e for each of the three
    y = sum_k g_k E_{e_k}(x)

W_g x and W_u x do not depend on the expert: they are computed once, and each chosen expert's delta is added to a copy
(`expand`: K copies, one for each of a token's choices). Between `expand` and `contract` a feed-forward block works
element by element, so the base's own code carries the copies through, whatever its activation. W_d is linear, so it
runs once on the gated sum instead of K times (`contract`):  sum_k g_k W_d a_k = W_d (sum_k g_k a_k).

Li et al., MixLoRA, arXiv:2404.15159, eq. 4-7.
"""

from __future__ import annotations

import torch
from torch import Tensor

from loramix.experts.apply import BACKENDS, choose
from loramix.routing import Routing


def expand(
    y_BTF: Tensor, x_BTI: Tensor, A_ERI: Tensor, B_EFR: Tensor, routing: Routing, scaling: float, backend: str
) -> Tensor:
    """Returns (K, B, T, F): the frozen projection y with the delta of each token's k-th expert."""
    return torch.stack(
        [
            BACKENDS[choose(backend, slot, A_ERI, B_EFR)](y_BTF, x_BTI, A_ERI, B_EFR, slot, scaling)
            for slot in routing.slots()
        ]
    )


def weighted(inner_KBTF: Tensor, routing: Routing) -> Tensor:
    """Returns g_k a_k, (K, B, T, F); their sum is what the frozen down-projection is run on."""
    slots, batch = inner_KBTF.shape[:2]
    return inner_KBTF * routing.weights.T.to(inner_KBTF.dtype).reshape(slots, batch, -1, 1)


def contract(
    y_BTO: Tensor, weighted_KBTF: Tensor, A_ERF: Tensor, B_EOR: Tensor, routing: Routing, scaling: float, backend: str
) -> Tensor:
    """Returns y + s * sum_k B_{e_k} A_{e_k} (g_k a_k), (B, T, O)."""
    for slot, inner_BTF in zip(routing.slots(), weighted_KBTF, strict=True):
        y_BTO = BACKENDS[choose(backend, slot, A_ERF, B_EOR)](y_BTO, inner_BTF, A_ERF, B_EOR, slot, scaling)
    return y_BTO
