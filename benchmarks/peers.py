"""The same mixtures written the way other libraries write them, for `step_cost.py` to measure beside loramix.

    loop+index_add   for each expert: find its tokens, gather them, A, B, weight, index_add (MoE-PEFT, MoLA)
    dense loop       every expert on every token, its output weighted and added at full width (LoRAMoE, HydraLoRA)
    stacked einsum   all experts stacked in each forward, every expert's output for every token made (PEFT's Arrow)
    per-expert FFN   the frozen gate and up run once, then for each expert: its tokens' rows, the frozen down run on
                     them, index_add (MixLoRA in MoE-PEFT)

Each is a module around frozen ones, with one nn.Linear for each matrix of each expert and a bias-free router of its
own. Routers leave a `Routing` behind, so that the same auxiliary losses can be taken. `peers_check.py` shows that each
computes what loramix computes.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from loramix.routing import Routing


@dataclass(frozen=True)
class Shape:
    """Sizes that all forms share: E, R, K (of sparse ones), the factor of the delta, and the dropout on the experts'
    input."""

    experts: int
    rank: int
    top_k: int = 2
    scaling: float = 2.0
    dropout: float = 0.0


class Experts(nn.Module):
    """LoRA experts of one linear, each matrix a module of its own; `shared_down` has one A for all. Dropout draws anew
    for each expert, on the tokens that it is given (loramix draws once for all experts of a module)."""

    def __init__(self, frozen: nn.Linear, experts: int, shape: Shape, shared_down: bool = False) -> None:
        super().__init__()
        self.scaling = shape.scaling
        self.dropout = nn.Dropout(shape.dropout) if shape.dropout > 0 else nn.Identity()
        downs = 1 if shared_down else experts
        self.lora_A = nn.ModuleList(nn.Linear(frozen.in_features, shape.rank, bias=False) for _ in range(downs))
        self.lora_B = nn.ModuleList(nn.Linear(shape.rank, frozen.out_features, bias=False) for _ in range(experts))
        for up in self.lora_B:
            nn.init.zeros_(up.weight)

    def __len__(self) -> int:
        return len(self.lora_B)

    def forward(self, expert: int, x: Tensor) -> Tensor:
        """Returns s B_e A_e dropout(x); a shared A runs again for each expert, as HydraLoRA writes it."""
        down = self.lora_A[expert % len(self.lora_A)]
        return self.lora_B[expert](down(self.dropout(x))) * self.scaling


class Mixture(nn.Module):
    """What the forms have in common: a router, and the decision it leaves behind."""

    def __init__(self, inputs: int, shape: Shape) -> None:
        super().__init__()
        self.top_k = shape.top_k
        self.router = nn.Linear(inputs, shape.experts, bias=False)
        self.routing: Routing | None = None

    def all_weights(self, x_NI: Tensor) -> Tensor:
        """Returns the softmax over all experts, (N, E)."""
        logits_NE = self.router(x_NI)
        weights_NE = logits_NE.softmax(dim=-1)
        self._leave(None, weights_NE, logits_NE, weights_NE)
        return weights_NE

    def top_weights(self, x_NI: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the K experts of each token and their weights, renormalised, (N, K) each."""
        logits_NE = self.router(x_NI)
        probabilities_NE = logits_NE.softmax(dim=-1)
        weights_NK, ids_NK = probabilities_NE.topk(self.top_k, dim=-1)
        weights_NK = weights_NK / weights_NK.sum(dim=-1, keepdim=True)
        self._leave(ids_NK, weights_NK, logits_NE, probabilities_NE)
        return ids_NK, weights_NK

    def tokens_by_expert(self, ids_NK: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Returns for each expert which choice of which token fell on it: a search for each expert."""
        mask_EKN = F.one_hot(ids_NK, self.router.out_features).permute(2, 1, 0)
        return [torch.where(mask_KN) for mask_KN in mask_EKN]  # type: ignore[misc]

    def _leave(self, ids: Tensor | None, weights: Tensor, logits: Tensor, probabilities: Tensor) -> None:
        everywhere_N = torch.ones(len(weights), dtype=torch.bool, device=weights.device)
        self.routing = Routing(ids, weights, logits, "token", everywhere_N, probabilities)


class MixedLinear(Mixture):
    """A mixture around one frozen linear."""

    def __init__(self, frozen: nn.Linear, shape: Shape, shared_down: bool = False) -> None:
        super().__init__(frozen.in_features, shape)
        self.frozen = frozen
        self.experts = Experts(frozen, shape.experts, shape, shared_down)

    def matching(self) -> dict[str, Experts]:
        """Returns the experts by what is to be added to this module's name to get loramix's."""
        return {"": self.experts}


class LoopIndexAdd(MixedLinear):
    """loop+index_add"""

    def forward(self, x_BTI: Tensor) -> Tensor:
        y_BTO = self.frozen(x_BTI)
        x_NI = x_BTI.reshape(-1, x_BTI.shape[-1])
        ids_NK, weights_NK = self.top_weights(x_NI)
        delta_NO = x_NI.new_zeros(len(x_NI), y_BTO.shape[-1])
        for expert, (choices, tokens) in enumerate(self.tokens_by_expert(ids_NK)):
            out_MO = self.experts(expert, x_NI[tokens]) * weights_NK[tokens, choices, None]
            delta_NO.index_add_(0, tokens, out_MO.to(delta_NO.dtype))  # they differ under autocast
        return y_BTO + delta_NO.view(y_BTO.shape)


class DenseLoop(MixedLinear):
    """dense loop"""

    def forward(self, x_BTI: Tensor) -> Tensor:
        y_BTO = self.frozen(x_BTI)
        weights_BTE = self.all_weights(x_BTI.reshape(-1, x_BTI.shape[-1])).view(*x_BTI.shape[:-1], -1)
        for expert in range(len(self.experts)):
            y_BTO = y_BTO + weights_BTE[..., expert, None] * self.experts(expert, x_BTI)
        return y_BTO


class StackedEinsum(MixedLinear):
    """stacked einsum, with the top-k router of MoLA"""

    def gates(self, x_NI: Tensor) -> Tensor:
        """Returns dense weights, (N, E)."""
        ids_NK, weights_NK = self.top_weights(x_NI)
        return weights_NK.new_zeros(len(x_NI), len(self.experts)).scatter(1, ids_NK, weights_NK)

    def forward(self, x_BTI: Tensor) -> Tensor:
        y_BTO = self.frozen(x_BTI)
        x_NI = x_BTI.reshape(-1, x_BTI.shape[-1])
        gates_NE = self.gates(x_NI)
        A_ERI = torch.stack([down.weight for down in self.experts.lora_A])
        B_EOR = torch.stack([up.weight for up in self.experts.lora_B])
        code_NER = torch.einsum("ni,eri->ner", x_NI, A_ERI)
        out_NEO = torch.einsum("ner,eor->neo", code_NER, B_EOR) * self.experts.scaling
        return y_BTO + torch.einsum("ne,neo->no", gates_NE, out_NEO).view(y_BTO.shape)


class StackedPrototypes(StackedEinsum):
    """stacked einsum, with Arrow's router: `router.weight` holds the prototypes and is not trained"""

    def __init__(self, frozen: nn.Linear, shape: Shape) -> None:
        super().__init__(frozen, shape)
        self.router.requires_grad_(False)

    def gates(self, x_NI: Tensor) -> Tensor:
        logits_NE = self.router(x_NI).abs()
        chosen_NK, ids_NK = logits_NE.topk(self.top_k, dim=-1)
        kept_NE = torch.full_like(logits_NE, float("-inf")).scatter(1, ids_NK, chosen_NK)
        return kept_NE.softmax(dim=-1)


class PerExpertFFN(Mixture):
    """per-expert FFN, around a frozen feed-forward block"""

    def __init__(self, block: Any, shape: Shape) -> None:
        super().__init__(block.gate_proj.in_features, shape)
        self.frozen = block
        halves = ("gate_proj", "up_proj", "down_proj")
        self.experts = nn.ModuleDict({name: Experts(getattr(block, name), shape.experts, shape) for name in halves})

    def matching(self) -> dict[str, Experts]:
        """As in `MixedLinear`."""
        return {f".{name}": experts for name, experts in self.experts.items()}  # type: ignore[misc]

    def forward(self, x_BTI: Tensor) -> Tensor:
        x_NI = x_BTI.reshape(-1, x_BTI.shape[-1])
        ids_NK, weights_NK = self.top_weights(x_NI)
        gate_NF, up_NF = self.frozen.gate_proj(x_NI), self.frozen.up_proj(x_NI)
        y_NI = torch.zeros_like(x_NI)
        for expert, (choices, tokens) in enumerate(self.tokens_by_expert(ids_NK)):
            x_MI = x_NI[tokens]
            gate_MF = gate_NF[tokens] + self.experts["gate_proj"](expert, x_MI)
            up_MF = up_NF[tokens] + self.experts["up_proj"](expert, x_MI)
            inner_MF = self.frozen.act_fn(gate_MF) * up_MF
            out_MI = self.frozen.down_proj(inner_MF) + self.experts["down_proj"](expert, inner_MF)
            y_NI.index_add_(0, tokens, out_MI * weights_NK[tokens, choices, None])
        return y_NI.view(x_BTI.shape)


class PlainLora(nn.Module):
    """One LoRA around one frozen linear: what MixLoRA has on attention."""

    def __init__(self, frozen: nn.Linear, shape: Shape) -> None:
        super().__init__()
        self.frozen = frozen
        self.experts = Experts(frozen, 1, shape)

    def matching(self) -> dict[str, Experts]:
        """As in `MixedLinear`."""
        return {"": self.experts}

    def forward(self, x_BTI: Tensor) -> Tensor:
        return self.frozen(x_BTI) + self.experts(0, x_BTI)


def shared_down(frozen: nn.Linear, shape: Shape) -> DenseLoop:
    """Returns a dense loop with one A for all experts."""
    return DenseLoop(frozen, shape, shared_down=True)


FORMS: dict[tuple[str, str], Callable[[Any, Shape], nn.Module]] = {
    ("mola", "loop+index_add"): LoopIndexAdd,
    ("mola", "stacked einsum"): StackedEinsum,
    ("molora", "dense loop"): DenseLoop,
    ("loramoe", "dense loop"): DenseLoop,
    ("hydralora", "dense loop"): shared_down,
    ("arrow", "stacked einsum"): StackedPrototypes,
    ("mixlora", "per-expert FFN"): PerExpertFFN,
}
"""By method (named as in `loramix methods`) and form."""

FULL_WIDTH = ("dense loop", "stacked einsum")
"""Forms that keep every expert's output of every token, at full width, for the backward pass."""


def shared_copy(base: nn.Module) -> Any:
    """Returns a model with modules of its own and the base's very parameters and buffers."""
    held = {id(tensor): tensor for tensor in (*base.parameters(), *base.buffers())}
    return copy.deepcopy(base, held)


def put_in(model: Any, method: str, form: str, leaves: Sequence[str], shape: Shape) -> Any:
    """Puts a peer's form on every linear whose last name is in `leaves` (on feed-forward blocks and attention's linears
    for whole blocks) and returns the model, frozen but for it."""
    make = FORMS[method, form]
    model.requires_grad_(False)
    for name, module in list(model.named_modules()):
        parent, _, leaf = name.rpartition(".")
        holder = model.get_submodule(parent)
        if make is PerExpertFFN and leaf == "mlp":
            setattr(holder, leaf, PerExpertFFN(module, shape))
        elif make is PerExpertFFN and leaf in leaves and "self_attn" in name:
            setattr(holder, leaf, PlainLora(module, shape))
        elif make is not PerExpertFFN and leaf in leaves:
            setattr(holder, leaf, make(module, shape))
    return model


def routings(model: nn.Module) -> dict[str, Routing]:
    """Returns what each router of a peer's model decided in the last forward."""
    found = {name: module.routing for name, module in model.named_modules() if isinstance(module, Mixture)}
    return {name: routing for name, routing in found.items() if routing is not None}


def forget(model: nn.Module) -> None:
    """Drops what the last forward left behind."""
    for module in model.modules():
        if isinstance(module, Mixture):
            module.routing = None
