"""The dense token router: every expert takes part, weighted by the softmax.

    g = softmax(W x)

MoLoRA (Zadouri et al. 2023), HydraLoRA (Tian et al. 2024), LoRAMoE (Dou et al. 2024).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn

from loramix.routers.base import SettledBy, Site, new_weight
from loramix.routers.scores import token_logits
from loramix.routing import Call, Level, Routing


@dataclass(frozen=True, kw_only=True)
class SoftRouterConfig:
    """Choices of a soft router."""

    kind: str = "soft"
    init_std: float | None = None
    """Standard deviation of the router's start; None is Kaiming-uniform, as nn.Linear."""

    @property
    def level(self) -> Level:
        return "token"

    @property
    def settled_by(self) -> SettledBy:
        return "nothing"

    @property
    def in_parts(self) -> bool:
        return True

    def problems(self, fewest_experts: int) -> list[str]:
        return []

    def build(self, site: Site) -> SoftRouter:
        return SoftRouter(self, site)


class SoftRouter(nn.Module):
    """One bias-free matrix, logits_NE = x_NI W_EI^T; I * E parameters."""

    def __init__(self, config: SoftRouterConfig, site: Site) -> None:
        super().__init__()
        self.w_EI = new_weight(site.experts, site.inputs, config.init_std)

    def forward(self, x_BTI: Tensor, call: Call, scope: str, outputs: Callable[[], Tensor]) -> Routing:
        """Returns the routing of each token: all experts."""
        logits_NE = token_logits(x_BTI, self.w_EI)
        weights_NE = logits_NE.softmax(dim=1)
        return Routing(None, weights_NE, logits_NE, "token", call.mask_BT.flatten(), weights_NE)
