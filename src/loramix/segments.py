"""Rows that lie one after the other in one long row, without padding: where each begins and ends.

The layout of transformers' `DataCollatorWithFlattening` and of flash attention's variable-length kernels: input ids
(1, N), positions that begin at 0 in each row, `cu_seq_lens_q` (B + 1) with the borders.

Shapes: B rows, N tokens of all rows together.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import torch
from torch import Tensor

BORDERS = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")
"""The arguments of a forward that tell an attention where rows end, by transformers' names."""


@dataclass(frozen=True)
class Segments:
    """The borders of B rows among N tokens.

    Attributes:
        starts_B, ends_B: the first token of each row, and the one after its last, int64.
        of_token_N: the row of each token, int64.
    """

    starts_B: Tensor
    ends_B: Tensor
    of_token_N: Tensor

    @staticmethod
    def between(borders_B1: Tensor, tokens: int) -> Segments:
        """Returns the segments between borders 0, ..., N, any integer type (B + 1,).

        Args:
            borders_B1: cumulative lengths.
            tokens: N, so that nothing waits for an accelerator.
        """
        starts_B, ends_B = borders_B1[:-1].long(), borders_B1[1:].long()
        rows_B = torch.arange(len(starts_B), device=starts_B.device)
        return Segments(starts_B, ends_B, rows_B.repeat_interleave(ends_B - starts_B, output_size=tokens))

    @property
    def count(self) -> int:
        """B."""
        return len(self.starts_B)

    @cached_property
    def spans(self) -> list[tuple[int, int]]:
        """Start and end of each row as numbers; waits for the device. Shapes alone (the meta device) have none: rows of
        one length."""
        if self.of_token_N.is_meta:
            ends = [len(self.of_token_N) * row // self.count for row in range(self.count + 1)]
            return list(pairwise(ends))
        return list(zip(self.starts_B.tolist(), self.ends_B.tolist(), strict=True))

    def spread(self, values_BX: Tensor) -> Tensor:
        """Returns each row's value at each of its tokens, (N, ...)."""
        return values_BX[self.of_token_N]

    def sums(self, values_NX: Tensor) -> Tensor:
        """Returns the sum over each row's tokens, (B, ...)."""
        return values_NX.new_zeros(self.count, *values_NX.shape[1:]).index_add(0, self.of_token_N, values_NX)

    def running(self, values_NX: Tensor) -> Tensor:
        """Returns the sum of each token's value and those before it in its row, (N, ...); for counts, not floats."""
        all_NX = values_NX.cumsum(dim=0)
        before_BX = (all_NX - values_NX)[self.starts_B]
        return all_NX - self.spread(before_BX)

    def last_true(self, mask_N: Tensor) -> Tensor:
        """Returns where the last True of each row is, int64 (B,); a row's first token where it has none."""
        places_N = torch.where(mask_N, torch.arange(len(mask_N), device=mask_N.device), 0)
        return self.starts_B.scatter_reduce(0, self.of_token_N, places_N, "amax")

    def any(self, mask_N: Tensor) -> Tensor:
        """Returns which rows have a True, bool (B,)."""
        return self.sums(mask_N.long()) > 0

    def prefixes(self, lasts_B: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the tokens up to one of each row, int64 (M,), and the borders (B + 1,) of what is left; waits for the
        device.

        Args:
            lasts_B: the last token to be kept of each row.
        """
        places_N = torch.arange(len(self.of_token_N), device=lasts_B.device)
        kept_M = (places_N <= self.spread(lasts_B)).nonzero().squeeze(1)
        lengths_B = lasts_B + 1 - self.starts_B
        return kept_M, torch.nn.functional.pad(lengths_B.cumsum(0), (1, 0)).int()
