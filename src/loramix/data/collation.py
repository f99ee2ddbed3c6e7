"""Examples to batches of tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from loramix.data.prompts import Encoded
from loramix.data.records import Record
from loramix.labels import IGNORED
from loramix.losses import supervised_positions, supervised_tokens


@dataclass(frozen=True)
class Example:
    """An encoded record, the position of its domain among the experts, the record itself, for showing, and its place
    among the examples of a stage."""

    encoded: Encoded
    domain_id: int
    record: Record | None = None
    place: int = 0

    @property
    def length(self) -> int:
        return len(self.encoded.input_ids)

    @property
    def supervised_tokens(self) -> int:
        """Tokens that are predicted: supervised ones, but never the first of a row, which has nothing before it."""
        return sum(self.encoded.supervised[1:])


@dataclass(frozen=True)
class Collator:
    """Pads examples to a batch.

    Args:
        pad_token_id: fills the rows; masked everywhere.
        padding_side: "right" for training and scoring, "left" where the rows must end together.

    Returns from `__call__`:
        input_ids, attention_mask, labels: int64 (B, T); labels are -100 where nothing is learned.
        prompt_mask: the tokens before the first response, bool (B, W), W where the last prompt ends; padded on the left
            W is T.
        positions: positions whose logits some row's loss needs, int64 (P,).
        supervised: places in the flattened batch whose next token is learned, int64 (N,).
        supervised_rows: the row of each, int64 (N,).
        domain_ids, places: int64 (B,).
        What depends on the data's values (W, P, N) is worked out here, so that no step waits for an accelerator.
    """

    pad_token_id: int
    padding_side: str = "right"

    def __call__(self, examples: Sequence[Example]) -> dict[str, Tensor]:
        width = max(example.length for example in examples)
        shape = (len(examples), width)
        ids = torch.full(shape, self.pad_token_id)
        mask = torch.zeros(shape, dtype=torch.int64)
        labels = torch.full(shape, IGNORED)
        prompt_mask = torch.zeros(shape, dtype=torch.bool)
        starts_of_response: list[int] = []
        for row, example in enumerate(examples):
            start = 0 if self.padding_side == "right" else width - example.length
            place = slice(start, start + example.length)
            tokens = torch.tensor(example.encoded.input_ids)
            supervised = torch.tensor(example.encoded.supervised)
            ids[row, place] = tokens
            mask[row, place] = 1
            labels[row, place] = torch.where(supervised, tokens, IGNORED)
            starts_of_response.append(start + example.encoded.prompt_length)
            prompt_mask[row, start : starts_of_response[-1]] = True
        supervised_N = supervised_tokens(labels)
        return {
            "input_ids": ids,
            "attention_mask": mask,
            "labels": labels,
            "prompt_mask": prompt_mask[:, : max(starts_of_response)],
            "positions": supervised_positions(labels),
            "supervised": supervised_N,
            "supervised_rows": supervised_N // width,
            "domain_ids": torch.tensor([example.domain_id for example in examples]),
            "places": torch.tensor([example.place for example in examples]),
        }
