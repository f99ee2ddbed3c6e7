"""Dropout on the experts' input: one mask for all experts of a module, kept as one byte for each number.

The frozen layer and the router see all of x. `nn.Dropout` draws a double for each number, keeps a mask of x's own size
and type and the product beside it; with five percent dropped that is a tenth to a third of a step
on a processor (docs/log.md).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

STEPS = 1 << 16
"""Into so many even steps a probability is rounded: 16 random bits decide over each number."""


class InputDropout(nn.Module):
    """Drops numbers of x in training, each with probability p, and scales the others by 1 / (1 - p).

    Args:
        p: 0 to below 1; rounded to a multiple of 1 / 65,536.
    """

    def __init__(self, p: float) -> None:
        super().__init__()
        self._of_steps = min(round(p * STEPS), STEPS - 1)
        self.p = self._of_steps / STEPS

    @property
    def factor(self) -> float:
        """What is left is multiplied by it: 1 / (1 - p) in training, else 1."""
        return 1 / (1 - self.p) if self.training else 1.0

    def draw(self, x: Tensor) -> Tensor | None:
        """Returns which numbers of x are kept, bool in x's shape; None, for all, outside training and for p = 0."""
        if not self.training or self._of_steps == 0:
            return None
        if x.device.type != "cpu" or torch.compiler.is_compiling():
            return torch.empty(x.shape, dtype=torch.bool, device=x.device).bernoulli_(1 - self.p)
        words = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(1 << 63), None)
        bits = words.view(torch.int16)[: x.numel()].view(x.shape)
        return bits >= self._of_steps - STEPS // 2

    def forward(self, x: Tensor) -> Tensor:
        """Returns x after dropout."""
        keep = self.draw(x)
        return x if keep is None else x.masked_fill(~keep, 0.0) * self.factor

    def extra_repr(self) -> str:
        return f"p={self.p:.5g}"


def left(x: Tensor, keep: Tensor | None) -> Tensor:
    """Returns what dropout leaves of x, not scaled. For what autograd does not follow."""
    if keep is None:
        return x
    factors = _factors(keep, x)
    return x * factors if factors is keep else factors.mul_(x)


def left_(x: Tensor, keep: Tensor | None) -> Tensor:
    """Returns x without what dropout takes of it, in place."""
    return x if keep is None else x.mul_(_factors(keep, x))


def _factors(keep: Tensor, x: Tensor) -> Tensor:
    """Returns ones and zeros to multiply x with. On a processor selecting by a mask takes several times as long as
    bytes made into numbers and a product (docs/log.md); elsewhere a product takes the mask as it is."""
    return keep.view(torch.uint8).to(x.dtype) if x.device.type == "cpu" else keep
