"""The routing loss of MoA: each layer's router is taught the domain label.

Feng et al. 2024, L = L_LM + eta * L_cls. The paper does not say whether L_cls is a sum or a mean over layers; the mean
is taken, so that eta does not depend on depth.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

from loramix.routing import Routing


def routing_cross_entropy(routings: Mapping[str, Routing], domain_ids_B: Tensor) -> Tensor:
    """Returns the cross-entropy of each sequence, mean over layers, (B,); rows without a prompt count as zero.

    Args:
        routings: the sequence routings of one forward, by scope.
        domain_ids_B: the label of each row, as a position among the experts.

    Raises:
        ValueError: no routing carries logits (no router ran).
    """
    losses = [
        F.cross_entropy(routing.logits, domain_ids_B, reduction="none") * routing.mask
        for routing in routings.values()
        if routing.logits is not None
    ]
    if not losses:
        raise ValueError(
            "routing cross-entropy needs router logits, but no router ran in this forward. Check that the adapter is "
            "enabled and that its method has a sequence router."
        )
    return torch.stack(losses).mean(dim=0)


def layer_correct(routings: Mapping[str, Routing], domain_ids_B: Tensor) -> Tensor:
    """Returns whether each layer's first choice is the label, bool (layers, B)."""
    return torch.stack([r.logits.argmax(dim=1) == domain_ids_B for r in routings.values() if r.logits is not None])
