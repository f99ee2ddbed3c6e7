"""A micro-batch that is long, or does not fit into memory, is learned in parts: the same rows, the same sums."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from loramix.data.padding_free import some_rows
from loramix.losses import supervised_tokens

WHOLE = ("positions", "supervised", "supervised_rows")
"""What belongs to the batch and not to its rows."""


PROCESSOR_TOKENS = 1024
"""What a processor does at once: its caches hold some hundred tokens of a layer, and more run from memory."""


def bound_of(tokens_at_once: int) -> int:
    """Returns how many tokens are learned at once, 0 for no bound; -1 asks for what suits the device."""
    if tokens_at_once >= 0:
        return tokens_at_once
    return 0 if torch.accelerator.is_available() else PROCESSOR_TOKENS


def out_of_memory(error: BaseException) -> bool:
    """Returns whether an exception says that memory ran out, of an accelerator or of the machine."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)


def within(batch: dict[str, Any], most: int) -> Iterator[dict[str, Any]]:
    """Yields a batch's rows in parts of at most so many tokens, padding counted; a longer row is a part by itself.

    Args:
        batch: as `Collator` or `PaddingFreeCollator` makes it.
        most: tokens of a part; 0 for no bound.
    """
    if most == 0 or batch["input_ids"].numel() <= most:
        yield batch
        return
    if "cu_seq_lens_q" in batch:
        lengths = batch["cu_seq_lens_q"].diff().tolist()
    else:
        lengths = [batch["input_ids"].shape[1]] * len(batch["domain_ids"])
    bounds, tokens = [0], 0
    for row, length in enumerate(lengths):
        if tokens and tokens + length > most:
            bounds.append(row)
            tokens = 0
        tokens += length
    yield from _cut(batch, [*bounds, len(lengths)])


def in_parts(batch: dict[str, Any], parts: int) -> Iterator[dict[str, Any]]:
    """Yields a batch's rows in so many parts, as even as can be; fewer where it has fewer rows.

    Args:
        batch: as `Collator` or `PaddingFreeCollator` makes it.
        parts: how many.
    """
    rows = len(batch["domain_ids"])
    bounds = [rows * part // min(parts, rows) for part in range(min(parts, rows) + 1)]
    yield from _cut(batch, bounds)


def _cut(batch: dict[str, Any], bounds: Sequence[int]) -> Iterator[dict[str, Any]]:
    if len(bounds) == 2:
        yield batch
        return
    for first, last in pairwise(bounds):
        yield some_rows(batch, first, last) if "cu_seq_lens_q" in batch else _padded_rows(batch, first, last)


def real_tokens(batch: dict[str, Any]) -> Tensor:
    """Returns how many tokens of a batch are not padding, a scalar."""
    if "attention_mask" in batch:
        mask_BT: Tensor = batch["attention_mask"]
        return mask_BT.sum()
    ids_1N: Tensor = batch["input_ids"]
    return torch.tensor(ids_1N.numel(), device=ids_1N.device)


def _padded_rows(batch: dict[str, Any], first: int, last: int) -> dict[str, Any]:
    part = {name: value if name in WHOLE else value[first:last] for name, value in batch.items()}
    supervised_N = supervised_tokens(part["labels"])
    return {**part, "supervised": supervised_N, "supervised_rows": supervised_N // part["labels"].shape[1]}


class SmallerBatches:
    """Learns the micro-batches of a step, each in parts of a bounded length, and in as many as memory has turned out to
    need.

    Losses on a batch's statistics are those of the parts then; all others are sums, and stay what they were.

    Args:
        most: tokens of a part; 0 for no bound.

    Attributes:
        parts: into which memory has made each of those be cut.
    """

    def __init__(self, most: int = 0) -> None:
        self.most, self.parts = most, 1
        self._step: Sequence[dict[str, Any]] = ()
        self._place = 0

    def begin_step(self, batches: Sequence[dict[str, Any]]) -> None:
        """Takes the micro-batches of a step, which will be learned in their order."""
        self._step, self._place = batches, 0

    def learn(
        self, batch: dict[str, Any], learn: Callable[[dict[str, Any]], Tensor], undo: Callable[[], None]
    ) -> Tensor:
        """Learns the next micro-batch and returns its loss. Where memory runs out, the step is undone, because its
        gradients may hold half of a backward, and learned again in parts half as large.

        Args:
            batch: the micro-batch.
            learn: forward and backward of one part; returns its loss.
            undo: takes back what the step has left so far.

        Raises:
            MemoryError: a single row is too much.
        """
        self._place += 1
        earlier: Sequence[dict[str, Any]] = ()
        while True:
            try:
                for one in earlier:
                    self._learned(one, learn)
                return self._learned(batch, learn)
            except (RuntimeError, MemoryError) as error:
                if not out_of_memory(error):
                    raise
                if self.parts >= len(batch["domain_ids"]):
                    raise MemoryError from error
            self.parts, earlier = self.parts * 2, self._step[: self._place - 1]
            torch.cuda.empty_cache()
            undo()

    def _learned(self, batch: dict[str, Any], learn: Callable[[dict[str, Any]], Tensor]) -> Tensor:
        parts = (part for some in within(batch, self.most) for part in in_parts(some, self.parts))
        return torch.stack([learn(part) for part in parts]).sum()
