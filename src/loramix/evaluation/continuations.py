"""How likely a model finds given continuations of given contexts, and whether it would write them itself.

What benchmarks ask, where `scoring` answers what training asks. A model that settles experts by prompt settles them by
the context alone: what is scored is never seen by a router.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence

from loramix.errors import DataError
from loramix.evaluation.asking import Asking
from loramix.evaluation.prompt_groups import Group, Row, grouped
from loramix.evaluation.shared_prompts import MOST_TOKENS, Found, can_share, shared_logits
from loramix.models.head import head_can_choose, logits_at


@dataclass(frozen=True)
class Likelihood:
    """The natural log-probability of a continuation, and whether greedy decoding would write it."""

    log_probability: float
    greedy: bool


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
    share_prompts: bool = True,
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
        batch_size: rows of a batch at most; of prompts that are shared, prompts.
        share_prompts: read a context with several continuations once, where that gives the same. Sums differ in their
            last bits.
        done: told after each batch how many requests it answered.

    Raises:
        DataError: a continuation longer than the model reads.
    """
    model.eval()
    asked_by: dict[Row, list[int]] = {}
    for number, (context, continuation) in enumerate(requests):
        if len(continuation) > max_length:
            raise DataError(
                f"a continuation has {len(continuation)} tokens, the model reads at most {max_length}. Shorten it."
            )
        both = (*context, *continuation)[-(max_length + 1) :]
        asked_by.setdefault(Row(both[:-1], len(both) - len(continuation)), []).append(number)
    found = [Likelihood(0.0, False)] * len(requests)
    for batch in _all_logits(model, list(asked_by), share_prompts, asking, pad_token_id, batch_size):
        for row, logits_LV in batch:
            log_probabilities_LV = logits_LV.float().log_softmax(dim=1)
            best_L = logits_LV.argmax(dim=1)
            for number in asked_by[row]:
                wanted_L = torch.tensor(requests[number][1], device=logits_LV.device)
                each_L1 = log_probabilities_LV.gather(1, wanted_L.unsqueeze(1))
                found[number] = Likelihood(float(each_L1.double().sum()), bool((best_L == wanted_L).all()))
        if done is not None:
            done(sum(len(asked_by[row]) for row, _ in batch))
    return found


def _all_logits(
    model: nn.Module, rows: list[Row], share_prompts: bool, asking: Asking, pad_token_id: int, batch_size: int
) -> Iterator[Found]:
    """Yields all rows, some at a time, each with the logits that predict its continuation."""
    groups: list[Group] = []
    if share_prompts and can_share(model):
        reads_all = asking.settled_by == "prompt" and asking.expert is None
        groups, rows = grouped(rows, same_context=reads_all)
    can_choose = head_can_choose(model)
    how: dict[str, Any] = {"asking": asking, "pad_token_id": pad_token_id, "can_choose": can_choose}
    shared = shared_logits(model, groups, batch_size=batch_size, **how)
    return chain(shared, (_logits(model, some, **how) for some in _batches(rows, batch_size)))


def _batches(rows: list[Row], batch_size: int) -> Iterator[list[Row]]:
    """Yields rows of similar length together, the longest first: what does not fit into memory shows at once."""
    batch: list[Row] = []
    for row in sorted(rows, key=lambda row: -len(row.fed)):
        if batch and (len(batch) == batch_size or (len(batch) + 1) * len(batch[0].fed) > MOST_TOKENS):
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch


def _logits(model: nn.Module, rows: Sequence[Row], asking: Asking, pad_token_id: int, can_choose: bool) -> Found:
    """Reads rows at once, each for itself."""
    device = next(model.parameters()).device
    ids_BT = pad_sequence([torch.tensor(row.fed) for row in rows], batch_first=True, padding_value=pad_token_id)
    places_T = torch.arange(ids_BT.shape[1])
    lengths_B, contexts_B = torch.tensor([[len(row.fed), row.context] for row in rows]).unbind(dim=1)
    mask_BT = (places_T < lengths_B.unsqueeze(1)).long().to(device)
    prompt_mask_BW = (places_T[: int(contexts_B.max())] < contexts_B.unsqueeze(1)).to(device)
    first = int(contexts_B.min()) - 1
    told = asking.of_forward(prompt_mask_BW)
    read = {"input_ids": ids_BT.to(device), "attention_mask": mask_BT}
    logits_BPV = logits_at(model, places_T[first:].to(device), can_choose=can_choose, **read, **told)
    return [
        (row, logits_PV[row.context - 1 - first : len(row.fed) - first])
        for row, logits_PV in zip(rows, logits_BPV, strict=True)
    ]
