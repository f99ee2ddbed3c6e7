"""The stacked experts of one adapted module."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from loramix.experts import ffn, fused_ffn
from loramix.experts.apply import choose
from loramix.experts.config import BankConfig
from loramix.experts.dropping import InputDropout
from loramix.experts.fused import can_fuse
from loramix.experts.parts import Part, outputs_of
from loramix.routing import ExpertOutputs, Routing

SAMPLED_TOKENS = 32
"""How many tokens of a batch a loss over expert outputs looks at, in each module: outputs are wide, pairs many."""


class LoraBank(nn.Module):
    """E LoRA experts of one module as two tensors: A_ERI (E, R, I) and B_EOR (E, O, R); a shared one has E = 1.

    Slice e of the two is exactly PEFT's `lora_A.weight` (R, I) and `lora_B.weight` (O, R). One stacked tensor, not E
    modules: one optimizer tensor, and an expert that got no token has a zero gradient, not none, so data-parallel
    training never meets an unused parameter.

    Args:
        in_features, out_features: I and O of the frozen module.
        num_experts: E.
        rank: R of each expert.
        scaling: factor of the delta, alpha / r (or alpha / sqrt(r) for rsLoRA).
        form: what the experts share and how they are added up.
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
        form: BankConfig | None = None,
        dropout: float = 0.0,
        backend: str = "auto",
        init_weights: bool = True,
    ) -> None:
        super().__init__()
        self.form = form if form is not None else BankConfig()
        self.num_experts = num_experts
        self.rank = rank
        self.scaling = scaling
        self.backend = backend
        self.dropout = InputDropout(dropout)
        downs, ups = (1 if self.form.share == shared else num_experts for shared in ("down", "up"))
        self.A_ERI = nn.Parameter(torch.empty(downs, rank, in_features))
        self.B_EOR = nn.Parameter(torch.empty(ups, out_features, rank))
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

    def forward(self, base_layer: Callable[..., Tensor], x_BTI: Tensor, routing: Routing) -> Tensor:
        """Returns base_layer(x) with the routed experts' delta added, in the base's type."""
        return outputs_of([self.part(base_layer, x_BTI, routing)], x_BTI)[0]

    def part(self, base_layer: Callable[..., Tensor], x_BTI: Tensor, routing: Routing) -> Part:
        """Returns what this forward multiplies x with. Drawn anew each time where a shared matrix has dropout."""
        if self.form.combine == "matrices":
            A_ERI, B_EOR = self._summed(routing)
            routing = one_expert(x_BTI)
        else:
            A_ERI, B_EOR = self.matrices()
        backend = choose(self.backend, routing, A_ERI, B_EOR)
        return Part(base_layer, A_ERI, B_EOR, routing, backend, self.backend == "auto", self.scaling, self.dropout)

    def expand(self, base_layer: Callable[..., Tensor], x_BTI: Tensor, routing: Routing) -> Tensor:
        """Returns (K, B, T, O): the first half of a feed-forward block, for each of a token's experts."""
        A_ERI, B_EOR = self.matrices()
        if self._fuses(base_layer, x_BTI, routing, A_ERI, B_EOR):
            assert isinstance(base_layer, nn.Linear)
            keep_BTI, scaling = self.dropout.draw(x_BTI), self.scaling * self.dropout.factor
            return fused_ffn.expand(base_layer, x_BTI, keep_BTI, A_ERI, B_EOR, routing, scaling)
        y_BTO = base_layer(x_BTI)
        dropped_BTI = self.dropout(x_BTI.to(self.A_ERI.dtype))
        y = y_BTO.to(dropped_BTI.dtype)
        return ffn.expand(y, dropped_BTI, A_ERI, B_EOR, routing, self.scaling, self.backend).to(y_BTO.dtype)

    def contract(self, base_layer: Callable[..., Tensor], inner_KBTI: Tensor, routing: Routing) -> Tensor:
        """Returns (B, T, O): the second half of a feed-forward block, summed over each token's experts."""
        y_BTO = self._contracted(base_layer, inner_KBTI, routing)
        bias_O = getattr(base_layer, "bias", None)
        if bias_O is None:
            return y_BTO
        # Each expert has the frozen bias and is weighed with it: sum_k g_k b, where the frozen layer added b once.
        excess_N1 = (routing.weights.sum(dim=1, keepdim=True) - 1).to(y_BTO.dtype)
        return y_BTO + (excess_N1 * bias_O).view(y_BTO.shape)

    def _contracted(self, base_layer: Callable[..., Tensor], inner_KBTI: Tensor, routing: Routing) -> Tensor:
        A_ERI, B_EOR = self.matrices()
        if self._fuses(base_layer, inner_KBTI, routing, A_ERI, B_EOR):
            assert isinstance(base_layer, nn.Linear)
            keep_KBTI, scaling = self.dropout.draw(inner_KBTI), self.scaling * self.dropout.factor
            return fused_ffn.contract(base_layer, inner_KBTI, keep_KBTI, A_ERI, B_EOR, routing, scaling)
        weighted_KBTI = ffn.weighted(inner_KBTI, routing)
        y_BTO = base_layer(weighted_KBTI.sum(dim=0))
        dropped_KBTI = self.dropout(weighted_KBTI.to(self.A_ERI.dtype))
        y = y_BTO.to(dropped_KBTI.dtype)
        return ffn.contract(y, dropped_KBTI, A_ERI, B_EOR, routing, self.scaling, self.backend).to(y_BTO.dtype)

    def _fuses(
        self, base_layer: Callable[..., Tensor], x: Tensor, routing: Routing, A_ERI: Tensor, B_EOR: Tensor
    ) -> bool:
        """Whether the halves of a feed-forward block take their fused form: narrow experts."""
        narrow = choose(self.backend, routing.slots()[0], A_ERI, B_EOR) == "concat"
        return self.backend == "auto" and narrow and can_fuse(base_layer, x, A_ERI)

    def matrices(self) -> tuple[Tensor, Tensor]:
        """Returns A and B as this forward uses them: with dropout on the shared one."""
        A_ERI: Tensor = self.A_ERI
        B_EOR: Tensor = self.B_EOR
        if self.form.share == "down":
            A_ERI = F.dropout(A_ERI, self.form.weight_dropout, self.training)
        elif self.form.share == "up":
            B_EOR = F.dropout(B_EOR, self.form.weight_dropout, self.training)
        return A_ERI, B_EOR

    def _summed(self, routing: Routing) -> tuple[Tensor, Tensor]:
        """Returns sum_e g_e A_e and sum_e g_e B_e as one expert; g is the same for all rows."""
        gates_E = routing.gates(self.num_experts)[0].to(self.A_ERI.dtype)
        return torch.einsum("e,eri->ri", gates_E, self.A_ERI)[None], torch.einsum("e,eor->or", gates_E, self.B_EOR)[
            None
        ]

    def each_output(self, x_BTI: Tensor) -> Tensor:
        """Returns what each expert makes of each token, s B_e A_e x, (B, T, E, O)."""
        code_BTER = torch.einsum("bti,eri->bter", x_BTI.to(self.A_ERI.dtype), self.A_ERI)
        return self.scaling * torch.einsum("bter,eor->bteo", code_BTER, self.B_EOR)

    def sampled_outputs(self, x_BTI: Tensor, routing: Routing) -> ExpertOutputs:
        """Returns what the chosen experts make of a sample of real tokens, evenly spaced over those of the batch: the
        same ones however the batch is padded."""
        places_S, mask_S = evenly_spaced(routing.mask, SAMPLED_TOKENS)
        x_SI = x_BTI.reshape(-1, x_BTI.shape[-1])[places_S].to(self.A_ERI.dtype)
        ids_SK = routing.chosen()[places_S]
        outputs_SEO = self.each_output(x_SI[None])[0]
        picked_SKO = outputs_SEO.gather(1, ids_SK[:, :, None].expand(-1, -1, outputs_SEO.shape[-1]))
        mask_SK = mask_S[:, None].expand_as(ids_SK)
        return ExpertOutputs(ids_SK.flatten(), picked_SKO.flatten(0, 1), mask_SK.flatten())


def evenly_spaced(mask_N: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """Returns places of True in a mask, evenly spaced among them, int64 (most,), and which of them count: where there
    are fewer than `most`, some are named twice. The shapes do not depend on the mask, so nothing waits for a device."""
    so_far_N = mask_N.cumsum(0)
    wanted_S = torch.arange(most, device=mask_N.device) * so_far_N[-1] // most
    places_S = torch.searchsorted(so_far_N, wanted_S, right=True).clamp(max=len(mask_N) - 1)
    first_S = torch.nn.functional.pad(wanted_S[1:] != wanted_S[:-1], (1, 0), value=True)
    return places_S, first_S & mask_N[places_S]


def one_expert(x_BTI: Tensor) -> Routing:
    """Returns the routing of a method without router: expert 0 with weight 1 for every row."""
    rows = x_BTI.shape[0]
    return Routing(
        ids=torch.zeros(rows, 1, dtype=torch.int64, device=x_BTI.device),
        weights=x_BTI.new_ones(rows, 1),
        logits=None,
        level="sequence",
        mask=torch.ones(rows, dtype=torch.bool, device=x_BTI.device),
    )
