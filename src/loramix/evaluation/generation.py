"""Greedy answers to held-out prompts, in batches, for every kind of model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from loramix.data.collation import Example
from loramix.routers.base import SettledBy


@torch.no_grad()  # inference mode would spoil the buffers that a base in parts (FSDP2) is gathered into
def answer(
    model: Any,
    tokenizer: Any,
    examples: Sequence[Example],
    *,
    settled_by: SettledBy,
    max_new_tokens: int,
    batch_size: int = 8,
    oracle: bool = False,
) -> list[str]:
    """Returns the answer to each example's prompt, in the order given.

    Prompts of similar length go through the model together, padded on the left. A model that settles experts by prompt
    is asked for its own decision (its label's expert where the decision is "pinned", or with `oracle`); one that is
    told the domain is told.

    Args:
        model: a base or a PeftModel, in evaluation mode.
        tokenizer: of the base.
        examples: what is asked is the part before the first response.
        settled_by: what a routing of the model follows from; "nothing" for a base or a single LoRA.
        max_new_tokens: of each answer.
        batch_size: prompts answered together.
        oracle: use the label's expert.
    """
    model.eval()
    order = sorted(range(len(examples)), key=lambda i: examples[i].encoded.prompt_length)
    answers = [""] * len(examples)
    told = settled_by == "domain" or (settled_by == "prompt" and (oracle or _pinned(model)))
    for start in range(0, len(order), batch_size):
        places = order[start : start + batch_size]
        prompts = [examples[i].encoded.input_ids[: examples[i].encoded.prompt_length] for i in places]
        batch = tokenizer.pad({"input_ids": prompts}, padding=True, padding_side="left", return_tensors="pt")
        device = next(model.parameters()).device
        asked = {name: batch[name].to(device) for name in ("input_ids", "attention_mask")}
        if told:
            asked["domain_ids"] = torch.tensor([examples[i].domain_id for i in places], device=device)
        written = model.generate(
            **asked, max_new_tokens=max_new_tokens, do_sample=False, pad_token_id=tokenizer.pad_token_id
        )
        fresh = written[:, asked["input_ids"].shape[1] :]
        for place, text in zip(places, tokenizer.batch_decode(fresh, skip_special_tokens=True), strict=True):
            answers[place] = text.strip()
    return answers


def _pinned(model: Any) -> bool:
    config = next(iter(getattr(model, "peft_config", {}).values()), None)
    return getattr(config, "decision", None) == "pinned"
