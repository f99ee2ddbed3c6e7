"""The stacked experts of one adapted module."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from loramix.experts.apply import choose
from loramix.routing import Routing


class LoraBank(nn.Module):
    """E LoRA experts of one module as two tensors: A_ERI (E, R, I) and B_EOR (E, O, R).

    Slice e of the two is exactly PEFT's `lora_A.weight` (R, I) and `lora_B.weight` (O, R). One stacked tensor, not E
    modules: one optimizer tensor, and an expert that got no token has a zero gradient, not none, so data-parallel
    training never meets an unused parameter.

    Args:
        in_features, out_features: I and O of the frozen module.
        num_experts: E.
        rank: R.
        scaling: factor of the delta, alpha / r (or alpha / sqrt(r) for rsLoRA).
        dropout: probability of dropping an input feature in training; one mask for all experts.
        backend: a name in `experts.apply.BACKENDS`, or "auto".
        init_weights: False leaves B random too (for tests); True is LoRA's start, delta = 0.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        num_experts: int,
        rank: int,
        scaling: float,
        dropout: float = 0.0,
        backend: str = "auto",
        init_weights: bool = True,
    ) -> None:
        super().__init__()
        self.num_experts = num_experts
        self.rank = rank
        self.scaling = scaling
        self.backend = backend
        self.dropout = nn.Dropout(dropout) if dropout > 0 else nn.Identity()
        self.A_ERI = nn.Parameter(torch.empty(num_experts, rank, in_features))
        self.B_EOR = nn.Parameter(torch.empty(num_experts, out_features, rank))
        if not self.A_ERI.is_meta:
            self.reset(init_weights)

    @torch.no_grad()
    def reset(self, init_weights: bool = True) -> None:
        """Kaiming-uniform A for each expert (as PEFT), zero B; so the delta is exactly zero at the start."""
        for down_RI in self.A_ERI:
            nn.init.kaiming_uniform_(down_RI, a=5**0.5)
        if init_weights:
            nn.init.zeros_(self.B_EOR)
        else:
            nn.init.normal_(self.B_EOR, std=1 / self.rank)

    def forward(self, y_BTO: Tensor, x_BTI: Tensor, routing: Routing) -> Tensor:
        """Returns y_BTO with the routed experts' delta added, in y's dtype."""
        x_BTI = self.dropout(x_BTI.to(self.A_ERI.dtype))
        apply = choose(self.backend, routing, self.num_experts)
        added = apply(y_BTO.to(x_BTI.dtype), x_BTI, self.A_ERI, self.B_EOR, routing, self.scaling)
        return added.to(y_BTO.dtype)
