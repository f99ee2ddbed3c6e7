"""How likely a model finds given continuations of given contexts, and whether it would write them itself.

What benchmarks ask, where `scoring` answers what training asks. A model that settles experts by prompt settles them by
the context alone: what is scored is never seen by a router.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from loramix.errors import ConfigError, DataError, did_you_mean
from loramix.methods import method_named
from loramix.models.head import head_can_choose, logits_at
from loramix.routers import SettledBy
from loramix.tuner.config import LoramixConfig

MOST_TOKENS = 4096
"""Tokens of a batch whose logits are wanted at most: a batch of long texts would take gigabytes for them."""


@dataclass(frozen=True)
class Asking:
    """What a model is told of the expert with every forward.

    Attributes:
        settled_by: what its routing follows from; "nothing" for a base or a single LoRA.
        expert: the position of the pinned expert, or of the domain; None for the model's own routing.
    """

    settled_by: SettledBy
    expert: int | None = None

    def of_forward(self, prompt_mask_BW: Tensor) -> dict[str, Any]:
        """Returns the routing arguments of a forward over contexts with their continuations.

        Args:
            prompt_mask_BW: the tokens of the contexts, bool (B, W); what a router may read.
        """
        told = self.of_generation(len(prompt_mask_BW), prompt_mask_BW.device)
        return {**told, "prompt_mask": prompt_mask_BW} if self.settled_by == "prompt" else told

    def of_generation(self, rows: int, device: torch.device) -> dict[str, Any]:
        """Returns the routing arguments of a generation from prompts."""
        return {} if self.expert is None else {"domain_ids": torch.full((rows,), self.expert, device=device)}


def asking_of(model: nn.Module, expert: str | None) -> Asking:
    """Returns what to tell a model of the expert.

    Args:
        model: a base or a PeftModel.
        expert: the name of the expert to pin, or of the domain for a model that must be told it; None leaves the choice
            to the model.

    Raises:
        ConfigError: the model pins no expert, has none of that name, or must be told one.
    """
    configs = getattr(model, "peft_config", {})
    config = configs.get(getattr(model, "active_adapter", None), None)
    if not isinstance(config, LoramixConfig) or method_named(config.method).settled_by == "nothing":
        if expert is not None:
            raise ConfigError(
                f"expert = {expert!r}: this model settles no expert for a prompt (a base, a single LoRA, or a mixture "
                "routed token by token), so none can be pinned. Leave it out."
            )
        return Asking("nothing")
    settled_by = method_named(config.method).settled_by
    names = list((config.domains if settled_by == "domain" else None) or config.experts or [])
    if expert is None:
        if settled_by == "domain":
            raise ConfigError(
                f"method {config.method} must be told the domain of every question, and a benchmark does not say it. "
                f"Pin one of {', '.join(names)} (--expert NAME)."
            )
        if config.decision == "pinned":
            raise ConfigError(
                'this adapter\'s decision is "pinned": somebody else says which expert answers. '
                f"Pin one of {', '.join(names)} (--expert NAME)."
            )
        return Asking(settled_by)
    if expert not in names:
        raise ConfigError(
            f"expert = {expert!r}: no such expert.{did_you_mean(expert, names)} Expected one of {', '.join(names)}."
        )
    return Asking(settled_by, names.index(expert))


@dataclass(frozen=True)
class Likelihood:
    """The natural log-probability of a continuation, and whether greedy decoding would write it."""

    log_probability: float
    greedy: bool


@dataclass(frozen=True)
class _Row:
    """What one row of a batch is fed: a context and all of a continuation but its last token."""

    fed: tuple[int, ...]
    context: int


Request = tuple[Sequence[int], Sequence[int]]
"""Token ids of a context and of its continuation, each at least one."""


@torch.no_grad()  # inference mode would spoil the buffers that a base in parts (FSDP2) is gathered into
def likelihoods(
    model: nn.Module,
    requests: Sequence[Request],
    *,
    asking: Asking,
    pad_token_id: int,
    max_length: int,
    batch_size: int = 8,
    done: Callable[[int], Any] | None = None,
) -> list[Likelihood]:
    """Returns how likely each continuation is after its context, in the order given.

    Continuations that differ in their last token alone (the letters of a question's options) share one row. What is too
    long loses the beginning of its context.

    Args:
        model: a base or a PeftModel. Not changed; put into evaluation mode.
        requests: contexts and continuations.
        asking: from `asking_of`.
        pad_token_id: fills rows.
        max_length: tokens the model reads at most; the last token of a continuation is not read.
        batch_size: rows of a batch at most.
        done: told after each batch how many requests it answered.

    Raises:
        DataError: a continuation longer than the model reads.
    """
    model.eval()
    asked_by: dict[_Row, list[int]] = {}
    for number, (context, continuation) in enumerate(requests):
        if len(continuation) > max_length:
            raise DataError(
                f"a continuation has {len(continuation)} tokens, the model reads at most {max_length}. Shorten it."
            )
        both = (*context, *continuation)[-(max_length + 1) :]
        asked_by.setdefault(_Row(both[:-1], len(both) - len(continuation)), []).append(number)
    found = [Likelihood(0.0, False)] * len(requests)
    can_choose = head_can_choose(model)
    for rows in _batches(list(asked_by), batch_size):
        first, logits_BPV = _logits(model, rows, asking, pad_token_id, can_choose)
        for row, logits_PV in zip(rows, logits_BPV, strict=True):
            logits_LV = logits_PV[row.context - 1 - first : len(row.fed) - first].float()
            log_probabilities_LV = logits_LV.log_softmax(dim=1)
            best_L = logits_LV.argmax(dim=1)
            for number in asked_by[row]:
                wanted_L = torch.tensor(requests[number][1], device=logits_LV.device)
                each_L1 = log_probabilities_LV.gather(1, wanted_L.unsqueeze(1))
                found[number] = Likelihood(float(each_L1.double().sum()), bool((best_L == wanted_L).all()))
        if done is not None:
            done(sum(len(asked_by[row]) for row in rows))
    return found


def _batches(rows: list[_Row], batch_size: int) -> Iterator[list[_Row]]:
    """Yields rows of similar length together, the longest first: what does not fit into memory shows at once."""
    batch: list[_Row] = []
    for row in sorted(rows, key=lambda row: -len(row.fed)):
        if batch and (len(batch) == batch_size or (len(batch) + 1) * len(batch[0].fed) > MOST_TOKENS):
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch


def _logits(
    model: nn.Module, rows: Sequence[_Row], asking: Asking, pad_token_id: int, can_choose: bool
) -> tuple[int, Tensor]:
    """Returns a position and the logits from there on, (B, P, V); it is where the shortest context ends."""
    device = next(model.parameters()).device
    ids_BT = pad_sequence([torch.tensor(row.fed) for row in rows], batch_first=True, padding_value=pad_token_id)
    places_T = torch.arange(ids_BT.shape[1])
    lengths_B, contexts_B = torch.tensor([[len(row.fed), row.context] for row in rows]).unbind(dim=1)
    mask_BT = (places_T < lengths_B.unsqueeze(1)).long().to(device)
    prompt_mask_BW = (places_T[: int(contexts_B.max())] < contexts_B.unsqueeze(1)).to(device)
    first = int(contexts_B.min()) - 1
    wanted_P = places_T[first:].to(device)
    told = asking.of_forward(prompt_mask_BW)
    read = {"input_ids": ids_BT.to(device), "attention_mask": mask_BT}
    return first, logits_at(model, wanted_P, can_choose=can_choose, **read, **told)
