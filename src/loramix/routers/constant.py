"""The weights of LoRAHub: one number per expert for the whole model, found from a few examples.

Huang et al., LoraHub, COLM 2024, arXiv:2307.13269. The weights are no distribution: they may be negative and need not
sum to 1. They start at zero, where the model is the bare base.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from loramix.routers.base import SettledBy, Site
from loramix.routing import Call, Level, Routing


@dataclass(frozen=True, kw_only=True)
class ConstantRouterConfig:
    """Choices of constant weights: there are none."""

    kind: str = "constant"

    @property
    def level(self) -> Level:
        return "sequence"

    @property
    def settled_by(self) -> SettledBy:
        return "nothing"

    @property
    def in_parts(self) -> bool:
        return True

    def problems(self, fewest_experts: int) -> list[str]:
        return []

    def build(self, site: Site) -> ConstantRouter:
        return ConstantRouter(site)


class ConstantRouter(nn.Module):
    """weights_E, the same for every sequence."""

    def __init__(self, site: Site) -> None:
        super().__init__()
        self.weights_E = nn.Parameter(torch.zeros(site.experts))

    def forward(self, x_BTI: Tensor, call: Call, scope: str, outputs: Callable[[], Tensor]) -> Routing:
        """Returns the same weights for each sequence."""
        rows = call.rows
        mask_B = torch.ones(rows, dtype=torch.bool, device=x_BTI.device)
        return Routing(None, self.weights_E.expand(rows, -1), None, "sequence", mask_B)
