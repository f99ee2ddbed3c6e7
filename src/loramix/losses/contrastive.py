"""The contrastive loss of MoELoRA (Luo): outputs of one expert alike, outputs of different experts unlike.

Luo et al., arXiv:2402.12851. For the output o_i of expert e on some token:

    L_i = -log( sum over other outputs o_j of the same expert of exp(cos(o_i, o_j) / tau)
                / sum over all other outputs of exp(cos(o_i, o_j) / tau) )
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.nn import functional as F

from loramix.losses.mean import mean_of
from loramix.routing import ExpertOutputs


def contrastive(outputs: Iterable[ExpertOutputs], temperature: float = 0.1) -> Tensor:
    """Returns the loss, mean over outputs that have a like one, then over modules.

    While B is zero all outputs are zero and so is their gradient direction: a module whose outputs are all zero gives a
    constant, and begins to count once the language-model loss has moved its experts.

    Args:
        outputs: a sample of expert outputs of each module.
        temperature: tau.
    """
    return mean_of(
        (_of_module(one, temperature) for one in outputs),
        "the contrastive loss needs expert outputs, but none were kept in this forward. Check that the adapter is "
        "enabled and that the model is in training mode.",
    )


def _of_module(one: ExpertOutputs, temperature: float) -> Tensor:
    unit_MO = F.normalize(one.outputs_MO.float(), dim=1, eps=1e-6)
    scores_MM = unit_MO @ unit_MO.T / temperature
    itself_MM = torch.eye(len(unit_MO), dtype=torch.bool, device=unit_MO.device)
    others_MM = one.mask_M[None, :] & ~itself_MM
    alike_MM = others_MM & (one.ids_M[:, None] == one.ids_M[None, :])
    nothing = torch.finfo(scores_MM.dtype).min
    of_all_M = scores_MM.masked_fill(~others_MM, nothing).logsumexp(dim=1)
    of_alike_M = scores_MM.masked_fill(~alike_MM, nothing).logsumexp(dim=1)
    counts_M = alike_MM.any(dim=1) & one.mask_M
    losses_M = torch.where(counts_M, of_all_M - of_alike_M, 0.0)
    return losses_M.sum() / counts_M.sum().clamp(min=1)
