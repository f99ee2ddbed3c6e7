"""The task gate of MOELoRA: the experts' weights follow from the task's id alone.

    omega = softmax(W_g e_task),    e_task a learned embedding of the task

Liu et al., MOELoRA, SIGIR 2024, arXiv:2310.18339. For one task the weights are constants.
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
class TaskRouterConfig:
    """Choices of a task gate."""

    kind: str = "task"
    embedding_size: int = 64

    @property
    def level(self) -> Level:
        return "sequence"

    @property
    def settled_by(self) -> SettledBy:
        return "domain"

    @property
    def in_parts(self) -> bool:
        return True

    def problems(self, fewest_experts: int) -> list[str]:
        if self.embedding_size < 1:
            return [f"router.embedding_size = {self.embedding_size}: expected at least 1; the paper's is 64."]
        return []

    def build(self, site: Site) -> TaskRouter:
        return TaskRouter(self, site)


class TaskRouter(nn.Module):
    """An embedding of the domains (D, 64) and a bias-free matrix (E, 64)."""

    def __init__(self, config: TaskRouterConfig, site: Site) -> None:
        super().__init__()
        self.embedding_DH = new_weight(site.domains, config.embedding_size, std=1.0)
        self.w_EH = new_weight(site.experts, config.embedding_size)

    def forward(self, x_BTI: Tensor, call: Call, scope: str, outputs: Callable[[], Tensor]) -> Routing:
        """Returns the routing of each sequence from its domain's id."""
        assert call.domain_ids_B is not None, "the guide asks for it"
        logits_BE = F.linear(F.embedding(call.domain_ids_B, self.embedding_DH.float()), self.w_EH.float())
        weights_BE = logits_BE.softmax(dim=1)
        mask_B = torch.ones(len(weights_BE), dtype=torch.bool, device=weights_BE.device)
        return Routing(None, weights_BE, logits_BE, "sequence", mask_B, weights_BE)
