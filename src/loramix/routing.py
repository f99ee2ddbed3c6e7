"""The routing decision as a value, and the context that carries it through one forward.

Legend of shapes, used in all of loramix:
    B batch (sequences)   T sequence length   N = B * T tokens   S places where a decision is made (B or N)
    I in features         O out features      R rank             E experts
    K experts chosen      V vocabulary

Nothing here is global: the context is a plain object that the adapted layers of one model share. A plain holder, and
not a contextvar, because contextvars break `torch.compile` graphs; a dict by scope, and not a list, because under
activation checkpointing a layer runs twice and a list would hold its routing twice.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from loramix.errors import ConfigError
from loramix.segments import Segments

Level = Literal["sequence", "token"]

NO_EXPERT = -1
"""Stands for an expert where the base alone answers."""


class ExpertOrder(NamedTuple):
    """The S * K choices of a routing, sorted by expert, for kernels that work on one expert's tokens together.

    Attributes:
        places_M: the place (0..S-1) of each sorted choice, int64 (M,), M = S * K.
        sorted_M: the choice (place * K + k) of each sorted position, int64 (M,).
        inverse_M: the sorted position of each choice, int64 (M,).
        ends_E: where each expert's choices end, int32 (E,).
    """

    places_M: Tensor
    sorted_M: Tensor
    inverse_M: Tensor
    ends_E: Tensor


@dataclass(frozen=True)
class Routing:
    """What a router decided.

    Attributes:
        ids: chosen experts, int64 (S, K); None where all E experts take part, in order (K = E).
        weights: their weights, (S, K).
        logits: the router's raw scores in fp32, (S, E); None where the decision was carried over or pinned
            and the router did not run, and for routers that score nothing.
        level: "sequence" (S = B, one decision for all tokens of a row) or "token" (S = N).
        mask: which of the S decisions count in losses and statistics, bool (S,).
        probabilities: the router's distribution before it selects, fp32 (S, E), where it has one; balance losses
            read it.
        segments: where the rows lie if they are one after the other in one long row; None for rows of a batch.
    """

    ids: Tensor | None
    weights: Tensor
    logits: Tensor | None
    level: Level
    mask: Tensor
    probabilities: Tensor | None = None
    segments: Segments | None = None

    def gates(self, num_experts: int) -> Tensor:
        """Returns the dense weights (S, E): `weights` at `ids`, zero elsewhere."""
        if self.ids is None:
            return self.weights
        dense = self.weights.new_zeros(self.ids.shape[0], num_experts)
        return dense.scatter_add(1, self.ids, self.weights)

    def chosen(self) -> Tensor:
        """Returns the experts that take part, int64 (S, K)."""
        if self.ids is not None:
            return self.ids
        places, experts = self.weights.shape
        return torch.arange(experts, device=self.weights.device).expand(places, experts)

    def order(self, num_experts: int) -> ExpertOrder:
        """Returns the choices sorted by expert; sorted once for all modules that follow this routing."""
        if "_order" not in self.__dict__:
            ids_SK = self.chosen()
            sorted_M = ids_SK.flatten().argsort(stable=True)
            inverse_M = torch.empty_like(sorted_M)
            inverse_M[sorted_M] = torch.arange(len(sorted_M), device=sorted_M.device)
            counts_E = torch.zeros(num_experts, dtype=torch.int32, device=ids_SK.device)
            counts_E.index_add_(0, ids_SK.flatten(), torch.ones_like(sorted_M, dtype=torch.int32))
            ends_E = counts_E.cumsum(0).int()
            self.__dict__["_order"] = ExpertOrder(sorted_M // ids_SK.shape[1], sorted_M, inverse_M, ends_E)
        order: ExpertOrder = self.__dict__["_order"]
        return order

    def slots(self) -> tuple[Routing, ...]:
        """Returns K routings, the k-th with each place's k-th choice at weight 1: for experts that are applied before
        they are weighed and summed. Made once, so that all modules of a block share what is sorted."""
        if "_slots" not in self.__dict__:
            ids_SK, ones_S1 = self.chosen(), torch.ones_like(self.weights[:, :1])
            self.__dict__["_slots"] = tuple(
                replace(self, ids=ids_SK[:, k : k + 1], weights=ones_S1) for k in range(ids_SK.shape[1])
            )
        slots: tuple[Routing, ...] = self.__dict__["_slots"]
        return slots

    def id_lists(self) -> list[list[int]]:
        """Returns each of the K choices of all places, as numbers; looked up once, which waits for the device. Shapes
        alone (the meta device) have none: the first expert everywhere."""
        if self.weights.is_meta:
            return [[0] * len(self.weights) for _ in range(self.weights.shape[1])]
        if "_id_lists" not in self.__dict__:
            self.__dict__["_id_lists"] = self.chosen().T.tolist()
        lists: list[list[int]] = self.__dict__["_id_lists"]
        return lists

    def by_token(self) -> Routing:
        """Returns the same decisions for each token of rows that lie one after the other; made once. A routing by
        token, or of rows of a batch, is returned as it is."""
        if self.level == "token" or self.segments is None:
            return self
        if "_by_token" not in self.__dict__:
            spread = self.segments.spread
            self.__dict__["_by_token"] = replace(
                self,
                ids=None if self.ids is None else spread(self.ids),
                weights=spread(self.weights),
                logits=None if self.logits is None else spread(self.logits),
                probabilities=None if self.probabilities is None else spread(self.probabilities),
                mask=spread(self.mask),
                level="token",
            )
        by_token: Routing = self.__dict__["_by_token"]
        return by_token

    def expanded(self, rows: int) -> Routing:
        """Returns the same decisions for `rows` rows, each repeated in place (beams follow their prompt)."""
        have = self.weights.shape[0]
        if rows == have:
            return self
        times = copies_per_row(have, rows)
        return replace(
            self,
            ids=None if self.ids is None else self.ids.repeat_interleave(times, 0),
            weights=self.weights.repeat_interleave(times, 0),
            logits=None if self.logits is None else self.logits.repeat_interleave(times, 0),
            probabilities=None if self.probabilities is None else self.probabilities.repeat_interleave(times, 0),
            mask=self.mask.repeat_interleave(times, 0),
        )


@dataclass(frozen=True)
class ExpertOutputs:
    """What some experts made of some tokens of one module, for losses that compare experts.

    Attributes:
        ids_M: the expert of each output, int64 (M,).
        outputs_MO: s B_e A_e x, (M, O).
        mask_M: which of them count (padding does not), bool (M,).
    """

    ids_M: Tensor
    outputs_MO: Tensor
    mask_M: Tensor


def copies_per_row(have: int, rows: int) -> int:
    """Returns how often each of `have` rows occurs among `rows` (beam search multiplies rows).

    Raises:
        ConfigError: `rows` is no multiple of `have`.
    """
    if have == 0 or rows % have:
        raise ConfigError(
            f"the routing was settled for {have} rows, but the model is run on {rows}. Expected the same number, or a "
            "multiple of it (beams). Route these rows anew, or pass one expert for each of them."
        )
    return rows // have


@dataclass
class Call:
    """What one forward of the model is told, and what its routers recorded.

    Attributes:
        mask_BT: real tokens of this forward's input, bool (B, T).
        prompt_mask_BT: tokens a sequence router may read, bool (B, T); never the response.
        prompt_width: where the last prompt ends, if known; reading the prompts goes no further.
        expert_ids_B: the expert of each row if it is settled (label, pin or decision), int64 (B,), NO_EXPERT for a row
            that the base answers alone; else None.
        domain_ids_B: the domain of each row, for routers that are told it, int64 (B,); else None.
        labels_B: the domain of each row as the caller gave it, for losses; None where it gave none.
        allowed_BE: the experts that each row's routers may choose among, bool (B, E); None where all may be chosen.
        carried: routings of the prefill, by scope, for the decode steps that follow it.
        base_only: this forward reads the prompt with the base alone: routers take in what they see, experts rest.
        stop_after: the scope after whose router the forward is abandoned (reading a prompt); None for a whole forward.
        pooled: by scope, what a router took in while the base read the prompt, (B, I).
        routings: by scope, in forward order: what each router decided.
        outputs: by module, what its experts made of a sample of tokens; only for losses that compare experts.
        segments: where the rows lie if the batch is one long row of them, T = N; None for rows of a batch. What is
            (B, T) elsewhere is then (1, N), what is (B,) stays.
    """

    mask_BT: Tensor
    prompt_mask_BT: Tensor
    prompt_width: int | None = None
    expert_ids_B: Tensor | None = None
    domain_ids_B: Tensor | None = None
    labels_B: Tensor | None = None
    allowed_BE: Tensor | None = None
    carried: dict[str, Routing] = field(default_factory=dict)
    base_only: bool = False
    stop_after: str | None = None
    pooled: dict[str, Tensor] = field(default_factory=dict)
    routings: dict[str, Routing] = field(default_factory=dict)
    outputs: dict[str, ExpertOutputs] = field(default_factory=dict)
    segments: Segments | None = None

    @property
    def rows(self) -> int:
        """How many sequences there are, B."""
        return len(self.mask_BT) if self.segments is None else self.segments.count

    def snapshot(self) -> Call:
        """Returns a copy with its own dicts, so that a recomputed layer neither sees nor changes later records."""
        return replace(self, routings=dict(self.routings), outputs=dict(self.outputs))


class PromptRead(Exception):
    """Ends a forward that was only run to read the prompt; caught by whoever started it."""


@dataclass(frozen=True)
class Ahead:
    """What was worked out for a module beside a neighbour that reads the same input (`tuner.shared_inputs`).

    Attributes:
        x: the input, in the state `version`: autograd counts changes in place.
        y: the module's output.
    """

    x: Tensor
    version: int
    y: Tensor

    @classmethod
    def of(cls, x: Tensor, y: Tensor) -> Ahead:
        """Returns what was made of x as it is now."""
        return cls(x, x._version, y)

    def is_for(self, x: Tensor) -> bool:
        """Whether it was made of this very tensor, which has not been changed since."""
        return self.x is x and self.version == x._version


class RoutingContext:
    """The holder that all adapted layers of one model share: the current `Call`, and what of modules was worked out
    ahead, by their names."""

    def __init__(self) -> None:
        self.call: Call | None = None
        self.ahead: dict[str, Ahead] = {}

    def __getstate__(self) -> dict[str, object]:
        """A copy of a model starts without a call: a call's tensors belong to the forward they came from."""
        return {"call": None, "ahead": {}}

    def current(self) -> Call:
        """Returns the open call.

        Raises:
            RuntimeError: an adapted layer ran outside a forward of the model that owns it.
        """
        if self.call is None:
            raise RuntimeError(
                "an adapted layer ran outside a forward of its model, so there is no prompt to route by. "
                "Call the whole model (the object given to get_peft_model), not one of its inner modules."
            )
        return self.call

    def passed(self, scope: str) -> None:
        """Called when the router of `scope` is done; ends the forward if nothing further is wanted.

        Raises:
            PromptRead: this was the last router to be asked.
        """
        if self.current().stop_after == scope:
            raise PromptRead(scope)


def last_true(mask_BT: Tensor) -> Tensor:
    """Returns the position of the last True of each row, int64 (B,); 0 for a row without any."""
    positions = torch.arange(mask_BT.shape[1], device=mask_BT.device)
    return (mask_BT * positions).amax(dim=1)
