"""Language-model loss as a sum and a count, so that it is divided once, however the batch was cut."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from loramix.labels import IGNORED


def supervised_positions(labels_BT: Tensor) -> Tensor:
    """Returns the positions whose logits some row needs, int64 (P,), ascending.

    Position t predicts label t + 1; positions before the first and after the last response need no LM head.
    """
    wanted_T = (labels_BT[:, 1:] != IGNORED).any(dim=0)
    return wanted_T.nonzero().squeeze(1)


def next_token_nll(logits_BPV: Tensor, labels_BT: Tensor, positions_P: Tensor) -> tuple[Tensor, Tensor]:
    """Returns (negative log-likelihood of each supervised token, the row each belongs to).

    Args:
        logits_BPV: logits at `positions_P` only.
        labels_BT: labels aligned with the input; -100 is not supervised.
        positions_P: positions as given by `supervised_positions`.

    Returns:
        nll_M in nats and rows_M, one entry for each supervised token.
    """
    targets_BP = labels_BT[:, positions_P + 1]
    supervised_BP = targets_BP != IGNORED
    nll_M = F.cross_entropy(logits_BPV[supervised_BP].float(), targets_BP[supervised_BP], reduction="none")
    rows_M = torch.nonzero(supervised_BP)[:, 0]
    return nll_M, rows_M
