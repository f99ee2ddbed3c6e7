"""Examples one after the other in one long row: a batch without padding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from loramix.data.collation import Example
from loramix.labels import IGNORED
from loramix.losses import supervised_tokens
from loramix.segments import BORDERS, Segments


@dataclass(frozen=True)
class PaddingFreeCollator:
    """Puts examples one after the other, as transformers' `DataCollatorWithFlattening` does.

    Returns from `__call__`, with N tokens of B examples:
        input_ids, position_ids, labels: int64 (1, N). Positions begin at 0 in each example; labels are -100 where
            nothing is learned and at each first token, which the example before must not predict. No attention mask:
            the borders say what may be seen.
        prompt_mask: the tokens before an example's first response, bool (1, N).
        cu_seq_lens_q, cu_seq_lens_k, max_length_q, max_length_k: the borders, int32 (B + 1,), and the longest example's
            length, by the names transformers' attentions know.
        positions, supervised: places whose next token is learned, int64 (M,).
        supervised_rows: the example each of them belongs to, int64 (M,).
        domain_ids, places: int64 (B,).
    """

    def __call__(self, examples: Sequence[Example]) -> dict[str, Any]:
        lengths = torch.tensor([example.length for example in examples])
        ids_N = torch.tensor([token for example in examples for token in example.encoded.input_ids])
        learned_N = torch.tensor([one for example in examples for one in example.encoded.supervised])
        return one_long_row(
            ids_N,
            torch.where(learned_N, ids_N, IGNORED),
            lengths,
            prompt_lengths_B=torch.tensor([example.encoded.prompt_length for example in examples]),
            of_rows={
                "domain_ids": torch.tensor([example.domain_id for example in examples]),
                "places": torch.tensor([example.place for example in examples]),
            },
        )


def one_long_row(
    ids_N: Tensor, labels_N: Tensor, lengths_B: Tensor, *, prompt_lengths_B: Tensor, of_rows: dict[str, Tensor]
) -> dict[str, Any]:
    """Returns the batch of rows that lie one after the other; what depends on values is worked out here.

    Args:
        ids_N: token ids of all rows.
        labels_N: what is learned, -100 elsewhere.
        lengths_B: of the rows.
        prompt_lengths_B: tokens of each row before its first response.
        of_rows: what else is known of each row, (B,) each.
    """
    borders_B1 = torch.nn.functional.pad(lengths_B.cumsum(0), (1, 0)).int()
    segments = Segments.between(borders_B1, len(ids_N))
    places_N = torch.arange(len(ids_N)) - segments.spread(segments.starts_B)
    labels_1N = labels_N.index_fill(0, segments.starts_B, IGNORED)[None]
    supervised_M = supervised_tokens(labels_1N)
    longest = int(lengths_B.max())
    return {
        "input_ids": ids_N[None],
        "position_ids": places_N[None],
        "labels": labels_1N,
        "prompt_mask": (places_N < segments.spread(prompt_lengths_B))[None],
        **dict(zip(BORDERS, (borders_B1, borders_B1.clone(), longest, longest), strict=True)),
        "positions": supervised_M,
        "supervised": supervised_M,
        "supervised_rows": segments.of_token_N[supervised_M],
        **of_rows,
    }


def some_rows(batch: dict[str, Any], first: int, last: int) -> dict[str, Any]:
    """Returns the batch of some of the rows of a batch made by `one_long_row`; looks at its borders.

    Args:
        batch: of B rows.
        first, last: the first row, and the one after the last.
    """
    borders_B1 = batch["cu_seq_lens_q"].cpu().long()
    part = slice(int(borders_B1[first]), int(borders_B1[last]))
    device = batch["input_ids"].device
    segments = Segments.between(borders_B1, int(borders_B1[-1]))
    made = one_long_row(
        batch["input_ids"][0, part].cpu(),
        batch["labels"][0, part].cpu(),
        borders_B1.diff()[first:last],
        prompt_lengths_B=segments.sums(batch["prompt_mask"][0].cpu().long())[first:last],
        of_rows={name: batch[name][first:last].cpu() for name in ("domain_ids", "places")},
    )
    return {name: value.to(device) if isinstance(value, Tensor) else value for name, value in made.items()}
