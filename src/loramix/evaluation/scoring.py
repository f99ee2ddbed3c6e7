"""How likely a model finds the responses: sums of negative log-likelihood, example by example."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from loramix.data.collation import Collator, Example
from loramix.losses import next_token_nll
from loramix.models.head import head_can_choose, logits_at


@dataclass(frozen=True)
class Score:
    """One example's negative log-likelihood in nats, summed over its supervised tokens, and their number.

    `letters` are the logits of given tokens where the response begins, if they were asked for."""

    nll: float
    tokens: int
    letters: tuple[float, ...] = ()


def perplexity(scores: Iterable[Score]) -> float:
    """Returns exp(total NLL / total tokens) over all examples; never a mean of per-batch perplexities."""
    collected = list(scores)
    return math.exp(sum(s.nll for s in collected) / sum(s.tokens for s in collected))


def batches_by_length(examples: Sequence[Example], batch_size: int) -> Iterator[list[int]]:
    """Yields positions of examples, similar lengths together, so that little is padded."""
    order = sorted(range(len(examples)), key=lambda i: examples[i].length)
    for start in range(0, len(order), batch_size):
        yield order[start : start + batch_size]


@torch.no_grad()  # inference mode would spoil the buffers that a base in parts (FSDP2) is gathered into
def score(
    model: nn.Module,
    examples: Sequence[Example],
    *,
    pad_token_id: int,
    experts: Sequence[int] | None = None,
    decision: str | None = None,
    batch_size: int = 8,
    seen: Callable[[list[int], nn.Module], None] | None = None,
    letters: Sequence[int] = (),
) -> list[Score]:
    """Returns the score of each example, in the order given.

    Args:
        model: a base, or a PeftModel. Not changed; put into evaluation mode.
        examples: with at least one supervised token each.
        pad_token_id: of the base.
        experts: the position of the expert to use for each example (the oracle, or a routing), for a routed model.
        decision: how a routed model settles the expert itself, when `experts` is None.
        batch_size: examples scored together.
        seen: called after each batch with the positions scored and the model, to read its routings.
        letters: token ids whose logits at the last prompt token are kept, to compare the options of a question.
    """
    model.eval()
    collate = Collator(pad_token_id)
    device = next(model.parameters()).device
    can_choose = head_can_choose(model)
    scores: list[Score] = [Score(0.0, 0)] * len(examples)
    for positions in batches_by_length(examples, batch_size):
        batch = {k: v.to(device) for k, v in collate([examples[i] for i in positions]).items()}
        asked: dict[str, Any] = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
        if experts is not None:
            asked["domain_ids"] = torch.tensor([experts[i] for i in positions], device=device)
            asked["prompt_mask"] = batch["prompt_mask"]
        elif decision is not None:
            # What is compared are decisions among experts; what goes to the base is calibrate's to measure.
            asked.update(decision=decision, prompt_mask=batch["prompt_mask"], abstain=False)
        wanted_P = batch["positions"]
        logits_BPV = logits_at(model, wanted_P, can_choose=can_choose, **asked)
        nll_BP, supervised_BP = next_token_nll(logits_BPV, batch["labels"], wanted_P)
        sums, counts = nll_BP.double().sum(dim=1).tolist(), supervised_BP.sum(dim=1).tolist()
        kept = _letters(logits_BPV, [examples[i] for i in positions], wanted_P, letters)
        for position, nll, tokens, logits in zip(positions, sums, counts, kept, strict=True):
            scores[position] = Score(nll, tokens, logits)
        if seen is not None:
            seen(positions, model)
    return scores


def _letters(
    logits_BPV: Tensor, examples: Sequence[Example], positions_P: Tensor, letters: Sequence[int]
) -> list[tuple[float, ...]]:
    """Returns the logits of some tokens at each row's last prompt token (rows padded on the right)."""
    if not letters:
        return [()] * len(examples)
    rows = [example.encoded.prompt_length - 1 for example in examples]
    places = torch.searchsorted(positions_P.cpu(), torch.tensor(rows)).to(logits_BPV.device)
    at_BV = logits_BPV[torch.arange(len(rows), device=logits_BPV.device), places]
    return [tuple(row) for row in at_BV[:, list(letters)].float().tolist()]
