"""Types of products that a part settles by itself, whatever autocast would make of them."""

from __future__ import annotations

import torch
from torch import Tensor


def without_autocast(like: Tensor) -> torch.autocast:
    """Returns a context in which operations keep the types of what they are given. Backwards ask for it too: who calls
    `backward` under autocast would change their types.

    Args:
        like: a tensor of the device in question; shapes alone (the meta device) go by a processor's autocast.
    """
    return torch.autocast("cpu" if like.is_meta else like.device.type, enabled=False)
