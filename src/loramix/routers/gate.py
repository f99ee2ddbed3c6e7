"""The gate of MoLE: experts are weighed by what they put out, not by what they are given.

    z = normalise(E_1(x) + ... side by side ... + E_E(x)),   g = softmax(W z / tau),   tau learned

Wu, Huang and Wei, Mixture of LoRA Experts, ICLR 2024, eq. 9-11. The paper flattens the outputs of a whole sequence,
which fixes its length and lets a token see later ones; here each token has its own gate, as a causal model needs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from loramix.routers.base import SettledBy, Site, new_weight
from loramix.routing import Call, Level, Routing


@dataclass(frozen=True, kw_only=True)
class GateRouterConfig:
    """Choices of a gate over expert outputs."""

    kind: str = "gate"

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

    def build(self, site: Site) -> GateRouter:
        return GateRouter(site)


class GateRouter(nn.Module):
    """One bias-free matrix W (E, E * O) and a temperature, kept as its logarithm so that it stays positive."""

    def __init__(self, site: Site) -> None:
        super().__init__()
        self.w_EX = new_weight(site.experts, site.experts * site.outputs)
        self.log_temperature = nn.Parameter(torch.zeros(()))

    def forward(self, x_BTI: Tensor, call: Call, scope: str, outputs: Callable[[], Tensor]) -> Routing:
        """Returns the routing of each token: all experts, weighed by their outputs at the door of the scope."""
        side_by_side_NX = outputs().flatten(0, 1).flatten(1).float()
        normalised_NX = F.layer_norm(side_by_side_NX, side_by_side_NX.shape[1:])
        logits_NE = F.linear(normalised_NX, self.w_EX.float()) * torch.exp(-self.log_temperature.float())
        weights_NE = logits_NE.softmax(dim=1)
        return Routing(None, weights_NE, logits_NE, "token", call.mask_BT.flatten(), weights_NE)
