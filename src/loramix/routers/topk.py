"""The token router of the sparse mixtures: softmax over all experts, then the K largest, then renormalised.

    p = softmax(W x)          over all E experts, in fp32
    ids = the K largest of p
    g = p[ids] / sum p[ids]   if renormalised

The order matters: a softmax over the chosen logits alone gives the same weights as this one renormalised, but the
balance loss needs p before the choice. MoSLD (Zhao et al. 2025, eq. 1), MoLA, MixLoRA; LLaVA-MoLE with K = 1 and
weight 1.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from loramix.routers.base import SettledBy, Site, new_weight, top_k_problems
from loramix.routers.scores import token_logits
from loramix.routing import Call, Level, Routing

WEIGHTINGS = ("renormalised", "probability", "one")


@dataclass(frozen=True, kw_only=True)
class TopKRouterConfig:
    """Choices of a top-k router."""

    kind: str = "topk"
    top_k: int = 2
    weighting: str = "renormalised"
    """Weight of a chosen expert: "renormalised" (the chosen sum to 1), "probability" (as the softmax gave it), or
    "one" (the router is taught by its auxiliary losses alone, as in LLaVA-MoLE)."""
    jitter: float = 0.0
    """In training the router's input is multiplied by noise from [1 - jitter, 1 + jitter]."""
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
        found = top_k_problems(self.top_k, fewest_experts)
        if self.weighting not in WEIGHTINGS:
            found.append(f"router.weighting = {self.weighting!r}: expected one of {', '.join(WEIGHTINGS)}.")
        if not 0 <= self.jitter < 1:
            found.append(f"router.jitter = {self.jitter}: expected 0 to below 1; common is 0.01.")
        return found

    def build(self, site: Site) -> TopKRouter:
        return TopKRouter(self, site)


class TopKRouter(nn.Module):
    """One bias-free matrix, logits_NE = x_NI W_EI^T; I * E parameters."""

    def __init__(self, config: TopKRouterConfig, site: Site) -> None:
        super().__init__()
        self.config = config
        self.w_EI = new_weight(site.experts, site.inputs, config.init_std)

    def forward(self, x_BTI: Tensor, call: Call, scope: str, outputs: Callable[[], Tensor]) -> Routing:
        """Returns the routing of each token."""
        if self.training and self.config.jitter > 0:
            x_BTI = x_BTI.float()
            x_BTI = x_BTI * torch.empty_like(x_BTI).uniform_(1 - self.config.jitter, 1 + self.config.jitter)
        logits_NE = token_logits(x_BTI, self.w_EI)
        probabilities_NE = logits_NE.softmax(dim=1)
        weights_NK, ids_NK = probabilities_NE.topk(self.config.top_k, dim=1)
        if self.config.weighting == "renormalised":
            weights_NK = weights_NK / weights_NK.sum(dim=1, keepdim=True)
        elif self.config.weighting == "one":
            weights_NK = torch.ones_like(weights_NK)
        return Routing(ids_NK, weights_NK, logits_NE, "token", call.mask_BT.flatten(), probabilities_NE)
