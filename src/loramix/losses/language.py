"""Language-model loss as a sum and a count, so that it is divided once, however the batch was cut."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from loramix.labels import IGNORED


def supervised_positions(labels_BT: Tensor) -> Tensor:
    """Returns the positions whose logits some row needs, int64 (P,), ascending.

    Position t predicts label t + 1; positions before the first and after the last response need no LM head.
    """
    wanted_T = (labels_BT[:, 1:] != IGNORED).any(dim=0)
    return wanted_T.nonzero().squeeze(1)


def supervised_tokens(labels_BT: Tensor) -> Tensor:
    """Returns the places in the flattened batch whose next token is supervised, int64 (N,), ascending."""
    wanted_BT = F.pad(labels_BT[:, 1:] != IGNORED, (0, 1))
    return wanted_BT.flatten().nonzero().squeeze(1)


def next_token_nll(logits_BPV: Tensor, labels_BT: Tensor, positions_P: Tensor) -> tuple[Tensor, Tensor]:
    """Returns (negative log-likelihood at each position, which of them are supervised), both (B, P).

    Shapes follow from the arguments alone, so nothing waits for an accelerator.

    Args:
        logits_BPV: logits at `positions_P` only.
        labels_BT: labels aligned with the input; -100 is not supervised.
        positions_P: positions as given by `supervised_positions`.

    Returns:
        nll_BP in nats, zero where nothing is supervised, and supervised_BP, bool.
    """
    targets_BP = labels_BT[:, positions_P + 1]
    nll_N = F.cross_entropy(
        logits_BPV.flatten(0, 1).float(), targets_BP.flatten(), reduction="none", ignore_index=IGNORED
    )
    return nll_N.view(targets_BP.shape), targets_BP != IGNORED
