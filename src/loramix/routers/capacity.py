"""The router of SiRA: top-k with a capacity for each expert and dropout on the gate.

    g = TopK(Dropout(softmax(W x)), K)
    an expert takes at most C = ceil(factor * K * T / E) tokens of a sequence; what comes later it drops

Zhu et al., SiRA, arXiv:2311.09179. A dropped token gets nothing from that expert: it falls back to the frozen path (and
to its other expert). The capacity is counted within a sequence, in the order of its tokens, over both choices of a
token together. So a token takes nothing from later ones but the length of the sequence, which sets C in training, and
nothing from the other rows of the batch. GShard, where the rule is from, fills all first choices of a batch before any
second one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from loramix.routers.base import SettledBy, Site, new_weight, top_k_problems
from loramix.routers.scores import token_logits
from loramix.routing import Call, Level, Routing


@dataclass(frozen=True, kw_only=True)
class CapacityRouterConfig:
    """Choices of a capacity router."""

    kind: str = "capacity"
    top_k: int = 2
    capacity_factor: float = 1.25
    """Room in training: 1 is just enough if all experts were chosen equally often."""
    eval_capacity_factor: float | None = None
    """Room at evaluation; None drops nothing, so that an answer does not depend on the length of its prompt."""
    gate_dropout: float = 0.1
    """Probability that an expert is left out for a token in training."""
    renormalised: bool = False
    """Whether the chosen weights are made to sum to 1; the paper's formula does not."""

    @property
    def level(self) -> Level:
        return "token"

    @property
    def settled_by(self) -> SettledBy:
        return "nothing"

    @property
    def in_parts(self) -> bool:
        return self.eval_capacity_factor is None  # room is counted over what one forward holds of a row

    def problems(self, fewest_experts: int) -> list[str]:
        found = top_k_problems(self.top_k, fewest_experts)
        for name in ("capacity_factor", "eval_capacity_factor"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                found.append(f"router.{name} = {value}: expected more than 0; common is 1.25.")
        if not 0 <= self.gate_dropout < 1:
            found.append(f"router.gate_dropout = {self.gate_dropout}: expected a probability from 0 to below 1.")
        return found

    def build(self, site: Site) -> CapacityRouter:
        return CapacityRouter(self, site)


class CapacityRouter(nn.Module):
    """One bias-free matrix, logits_NE = x_NI W_EI^T; I * E parameters."""

    def __init__(self, config: CapacityRouterConfig, site: Site) -> None:
        super().__init__()
        self.config = config
        self.w_EI = new_weight(site.experts, site.inputs)

    def forward(self, x_BTI: Tensor, call: Call, scope: str, outputs: Callable[[], Tensor]) -> Routing:
        """Returns the routing of each token; a dropped choice has weight 0."""
        config = self.config
        logits_NE = token_logits(x_BTI, self.w_EI)
        gates_NE = F.dropout(logits_NE.softmax(dim=1), config.gate_dropout, self.training)
        weights_NK, ids_NK = gates_NE.topk(config.top_k, dim=1)
        if config.renormalised:
            weights_NK = weights_NK / weights_NK.sum(dim=1, keepdim=True).clamp(min=1e-9)
        factor = config.capacity_factor if self.training else config.eval_capacity_factor
        if factor is not None:
            weights_NK = weights_NK * self.has_room(ids_NK, weights_NK > 0, call, factor)
        return Routing(ids_NK, weights_NK, logits_NE, "token", call.mask_BT.flatten(), gates_NE)

    def has_room(self, ids_NK: Tensor, served_NK: Tensor, call: Call, factor: float) -> Tensor:
        """Returns which choices find room with their expert, bool (N, K); padding and dropped gates take none.

        Args:
            ids_NK: the chosen experts.
            served_NK: whether the choice has a weight at all, bool (N, K).
            call: says which tokens are real and where rows end.
            factor: of the capacity.
        """
        experts, k = self.w_EI.shape[0], ids_NK.shape[1]
        experts_E = torch.arange(experts, device=ids_NK.device)
        chosen_NKE = (ids_NK[:, :, None] == experts_E) & served_NK[:, :, None]
        taken_NE = chosen_NKE.sum(dim=1) * call.mask_BT.reshape(-1, 1)
        if call.segments is not None:
            capacity_B = torch.ceil(factor * k * call.segments.sums(call.mask_BT[0].long()) / experts)
            fits_NE = call.segments.running(taken_NE) <= call.segments.spread(capacity_B)[:, None]
            return fits_NE.gather(1, ids_NK)
        places_BTE = taken_NE.view(*call.mask_BT.shape, experts).cumsum(dim=1)
        capacity_B = torch.ceil(factor * k * call.mask_BT.sum(dim=1) / experts)
        fits_BTE = places_BTE <= capacity_B[:, None, None]
        return fits_BTE.view(-1, experts).gather(1, ids_NK)
