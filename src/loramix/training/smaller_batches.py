"""A micro-batch that does not fit into memory is learned in parts: the same rows, the same sums."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from loramix.losses import supervised_tokens

WHOLE = ("positions", "supervised")
"""What belongs to the batch and not to its rows."""


def out_of_memory(error: BaseException) -> bool:
    """Returns whether an exception says that memory ran out, of an accelerator or of the machine."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)


def in_parts(batch: dict[str, Tensor], parts: int) -> Iterator[dict[str, Tensor]]:
    """Yields a batch's rows in so many parts, as even as can be; fewer where it has fewer rows.

    Args:
        batch: tensors (B, ...), but for those in WHOLE.
        parts: how many.
    """
    rows = len(batch["labels"])
    bounds = [rows * part // min(parts, rows) for part in range(min(parts, rows) + 1)]
    for first, last in pairwise(bounds):
        part = {name: value if name in WHOLE else value[first:last] for name, value in batch.items()}
        yield {**part, "supervised": supervised_tokens(part["labels"])}


class SmallerBatches:
    """Learns the micro-batches of a step, each in as many parts as memory has turned out to need.

    Losses on a batch's statistics are those of the parts then; all others are sums, and stay what they were.

    Attributes:
        parts: of each micro-batch.
    """

    def __init__(self) -> None:
        self.parts = 1
        self._step: Sequence[dict[str, Tensor]] = ()
        self._place = 0

    def begin_step(self, batches: Sequence[dict[str, Tensor]]) -> None:
        """Takes the micro-batches of a step, which will be learned in their order."""
        self._step, self._place = batches, 0

    def learn(
        self, batch: dict[str, Tensor], learn: Callable[[dict[str, Tensor]], Tensor], undo: Callable[[], None]
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
        earlier: Sequence[dict[str, Tensor]] = ()
        while True:
            try:
                for one in earlier:
                    self._learned(one, learn)
                return self._learned(batch, learn)
            except (RuntimeError, MemoryError) as error:
                if not out_of_memory(error):
                    raise
                if self.parts >= len(batch["labels"]):
                    raise MemoryError from error
            self.parts, earlier = self.parts * 2, self._step[: self._place - 1]
            torch.cuda.empty_cache()
            undo()

    def _learned(self, batch: dict[str, Tensor], learn: Callable[[dict[str, Tensor]], Tensor]) -> Tensor:
        return torch.stack([learn(part) for part in in_parts(batch, self.parts)]).sum()
