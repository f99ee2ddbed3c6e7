"""The sequence router of MoA: one decision for a whole sequence, taught by the domain label.

Feng et al., Mixture-of-LoRAs, LREC-COLING 2024, section 3: a two-layer MLP per transformer layer; in training the
label's expert is active in every layer and the routers learn the label by cross-entropy.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from loramix.routers.abstention import Abstention
from loramix.routers.base import SettledBy, Site, new_weight
from loramix.routing import Call, Level, Routing, last_true
from loramix.segments import Segments

POOLINGS = ("last", "mean")
READS = ("base", "experts")
ADDED_UNITS = 8
"""Hidden units that an expert brings along which joins a trained mixture."""
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "silu": F.silu,
    "relu": F.relu,
    "tanh": torch.tanh,
}


@dataclass(frozen=True, kw_only=True)
class SequenceRouterConfig:
    """Choices of a sequence router. The paper leaves `pooling`, `activation` and the bias open."""

    kind: str = "sequence"
    pooling: str = "last"
    """"last": the hidden state of the last prompt token; "mean": the mean over the prompt's tokens."""
    hidden_size: int | None = None
    """Width of the hidden layer; None = number of experts (which gives the paper's 1.05 M parameters)."""
    added: int = 0
    """How many of the experts, the last ones, joined after training; each brought ADDED_UNITS hidden units of its own,
    so that the scores of the others stayed what they were (adapters/growth.py)."""
    activation: str = "tanh"
    reads: str = "base"
    """What the prompt is read with. "experts": the running model, as the paper's text has it; in training the label's
    expert is active below each router, which can then recognise the expert instead of the domain. "base": the base
    alone, in training and at inference; nothing gives the label away (docs/decisions/0003-what-the-router-reads.md)."""

    @property
    def level(self) -> Level:
        return "sequence"

    @property
    def settled_by(self) -> SettledBy:
        return "prompt"

    @property
    def in_parts(self) -> bool:
        return True

    @property
    def reads_base(self) -> bool:
        return self.reads == "base"

    def problems(self, fewest_experts: int) -> list[str]:
        found = []
        if self.pooling not in POOLINGS:
            found.append(f"router.pooling = {self.pooling!r}: expected one of {', '.join(POOLINGS)}.")
        if self.reads not in READS:
            found.append(f"router.reads = {self.reads!r}: expected one of {', '.join(READS)}.")
        if self.activation not in ACTIVATIONS:
            found.append(f"router.activation = {self.activation!r}: expected one of {', '.join(ACTIVATIONS)}.")
        if self.hidden_size is not None and self.hidden_size < 1:
            found.append(f"router.hidden_size = {self.hidden_size}: expected at least 1, or null for one per expert.")
        if not 0 <= self.added < fewest_experts:
            found.append(f"router.added = {self.added}: expected 0 to fewer than the {fewest_experts} experts.")
        return found

    def width(self, num_experts: int) -> int:
        """Returns H: the hidden units of the first experts, and those that later ones brought."""
        return (self.hidden_size or num_experts - self.added) + ADDED_UNITS * self.added

    def build(self, site: Site) -> SequenceRouter:
        return SequenceRouter(self, site.inputs, site.experts)


class SequenceRouter(nn.Module):
    """Two-layer MLP without bias on one pooled prompt state: logits_BE = W2 act(W1 pool(x_BTI)).

    Parameters: I * H + H * E, with H = E by default (4096 -> 8 -> 8 in 32 layers is 1,050,624).
    """

    def __init__(self, config: SequenceRouterConfig, in_features: int, num_experts: int) -> None:
        super().__init__()
        self.config = config
        self.num_experts = num_experts
        hidden = config.width(num_experts)
        self.w_in_HI = new_weight(hidden, in_features)
        self.w_out_EH = new_weight(num_experts, hidden)
        self.abstention: Abstention | None = None

    def pool(self, x_BTI: Tensor, prompt_mask_BT: Tensor, segments: Segments | None = None) -> Tensor:
        """Returns one state per sequence in fp32, (B, I), from prompt positions only.

        Args:
            x_BTI: states.
            prompt_mask_BT: what may be read.
            segments: where the rows lie if they are one long row.
        """
        if segments is not None:
            x_NI, prompt_mask_N = x_BTI[0], prompt_mask_BT[0]
            if self.config.pooling == "last":
                return x_NI[segments.last_true(prompt_mask_N)].float()
            counts_B = segments.sums(prompt_mask_N.long()).clamp(min=1)
            return segments.sums(x_NI.float() * prompt_mask_N[:, None]) / counts_B[:, None]
        if self.config.pooling == "last":
            rows = torch.arange(x_BTI.shape[0], device=x_BTI.device)
            return x_BTI[rows, last_true(prompt_mask_BT)].float()
        weights_BT = prompt_mask_BT.float()
        summed_BI = torch.einsum("bt,bti->bi", weights_BT, x_BTI.float())
        return summed_BI / weights_BT.sum(dim=1, keepdim=True).clamp(min=1)

    def logits(self, pooled_BI: Tensor) -> Tensor:
        """Returns the scores in fp32, (B, E)."""
        hidden_BH = ACTIVATIONS[self.config.activation](F.linear(pooled_BI, self.w_in_HI.float()))
        return F.linear(hidden_BH, self.w_out_EH.float())

    def decide(self, pooled_BI: Tensor, call: Call) -> Routing:
        """Returns the routing of each sequence from its pooled prompt state, (B, I).

        The expert is the settled one if the call has one (label, pin, decision), else the router's own first choice.
        The weight is 1: the router is taught by its cross-entropy alone, as in the paper.
        """
        logits_BE = self.logits(pooled_BI)
        if call.allowed_BE is not None:  # before anything is chosen: what is not allowed has probability 0
            logits_BE = logits_BE.masked_fill(~call.allowed_BE, float("-inf"))
        chosen_B = logits_BE.argmax(dim=1) if call.expert_ids_B is None else call.expert_ids_B
        return self._hard(chosen_B, logits_BE, call)

    def forward(self, x_BTI: Tensor, call: Call, scope: str, outputs: Callable[[], Tensor]) -> Routing:
        """Returns the routing of each sequence.

        Args:
            x_BTI: input of the first adapted module of the layer.
            call: what this forward was told; its prompt mask says which positions may be read.
            scope: name of the layer.
            outputs: not asked.
        """
        if scope in call.pooled:
            return self.decide(call.pooled[scope], call)
        if self.config.reads_base and call.expert_ids_B is not None:
            return self._hard(call.expert_ids_B, None, call)
        return self.decide(self.pool(x_BTI, call.prompt_mask_BT, call.segments), call)

    @torch.no_grad()
    def with_expert(self, w_in_UI: Tensor, w_row_H: Tensor) -> SequenceRouter:
        """Returns a router of one expert more, whose other scores are this one's: they do not see the new units.

        Args:
            w_in_UI: the new hidden units, (ADDED_UNITS, I).
            w_row_H: the new expert's row of w_out over the old units and the new, (H + ADDED_UNITS,).
        """
        grown = SequenceRouter(
            replace(self.config, hidden_size=None, added=0), self.w_in_HI.shape[1], self.num_experts + 1
        )
        wide_EH = torch.cat([self.w_out_EH, self.w_out_EH.new_zeros(self.num_experts, ADDED_UNITS)], dim=1)
        grown.w_in_HI = nn.Parameter(torch.cat([self.w_in_HI, w_in_UI.to(self.w_in_HI)]))
        grown.w_out_EH = nn.Parameter(torch.cat([wide_EH, w_row_H[None].to(self.w_out_EH)]))
        grown.config = replace(self.config, added=self.config.added + 1)
        return grown

    def _hard(self, chosen_B: Tensor, logits_BE: Tensor | None, call: Call) -> Routing:
        # A row without expert names the first with weight 0: what is added to the base's output is exactly nothing.
        return Routing(
            ids=chosen_B.clamp(min=0)[:, None],
            weights=(chosen_B >= 0).to(self.w_out_EH.dtype)[:, None],
            logits=logits_BE,
            level="sequence",
            mask=call.prompt_mask_BT.any(dim=1) if call.segments is None else call.segments.any(call.prompt_mask_BT[0]),
        )
