"""The prototype router of Arrow: an expert is chosen by how strongly its own main direction sees the token.

    v_e = top right singular vector of B_e A_e        (its sign means nothing)
    ids = the K largest of |x . v_e|,    g = softmax(|x . v_ids| / temperature)

Ostapenko et al., Towards Modular LLMs by Building and Reusing a Library of LoRAs, ICML 2024, arXiv:2405.11157. Nothing
is trained; the prototypes are made when the experts are put in (`experts/prototypes.py`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from loramix.routers.base import SettledBy, Site, top_k_problems
from loramix.routers.scores import token_logits
from loramix.routing import Call, Level, Routing


@dataclass(frozen=True, kw_only=True)
class PrototypeRouterConfig:
    """Choices of a prototype router."""

    kind: str = "prototype"
    top_k: int = 2
    temperature: float = 1.0

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
        if self.temperature <= 0:
            found.append(f"router.temperature = {self.temperature}: expected more than 0.")
        return found

    def build(self, site: Site) -> PrototypeRouter:
        return PrototypeRouter(self, site)


class PrototypeRouter(nn.Module):
    """One unit vector per expert, prototypes_EI; a buffer, saved with the adapter and never trained."""

    def __init__(self, config: PrototypeRouterConfig, site: Site) -> None:
        super().__init__()
        self.config = config
        self.prototypes_EI: Tensor
        self.register_buffer("prototypes_EI", torch.zeros(site.experts, site.inputs))

    def forward(self, x_BTI: Tensor, call: Call, scope: str, outputs: Callable[[], Tensor]) -> Routing:
        """Returns the routing of each token."""
        logits_NE = token_logits(x_BTI, self.prototypes_EI).abs() / self.config.temperature
        chosen_NK, ids_NK = logits_NE.topk(self.config.top_k, dim=1)
        probabilities_NE = logits_NE.softmax(dim=1)
        weights_NK = chosen_NK.softmax(dim=1)
        return Routing(ids_NK, weights_NK, logits_NE, "token", call.mask_BT.flatten(), probabilities_NE)
