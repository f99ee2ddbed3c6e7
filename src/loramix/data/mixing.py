"""In which order the examples of several domains are seen.

The order is a list of positions made from (seed, epoch) alone: it does not depend on the number of loading workers, and
two runs with the same seed see the same batches.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from typing import Literal

from torch.utils.data import Sampler

Mixing = Literal["proportional", "uniform", "temperature", "weights"]

WINDOW = 4
"""Batches sorted by length together. Larger windows pad less, but lengths go by domain: a batch then holds one domain,
and routers see one label at a time and learn slowly (docs/log.md, 2026-11-22)."""


def domain_shares(
    sizes: Mapping[str, int], mixing: Mixing, *, temperature: float = 2.0, weights: Mapping[str, float] | None = None
) -> dict[str, float]:
    """Returns the share of each domain in the mixture; the shares sum to 1.

    proportional: size_d; uniform: 1; temperature: size_d^(1 / temperature); weights: as given. All are then normalised.
    """
    if mixing == "weights":
        raw = {domain: float((weights or {})[domain]) for domain in sizes}
    else:
        power = {"proportional": 1.0, "uniform": 0.0, "temperature": 1.0 / temperature}[mixing]
        raw = {domain: size**power for domain, size in sizes.items()}
    total = sum(raw.values())
    return {domain: value / total for domain, value in raw.items()}


def mixed_order(sizes: Sequence[int], shares: Sequence[float], length: int, seed: int, epoch: int) -> list[int]:
    """Returns `length` positions in the concatenation of the domains.

    Each domain gets its share, rounded so that the sum is right (largest remainders first), and goes through its
    examples in a random order without repeating any before all were seen.
    """
    exact = [share * length for share in shares]
    counts = [int(value) for value in exact]
    rest = sorted(range(len(exact)), key=lambda d: exact[d] - counts[d], reverse=True)
    for domain in rest[: length - sum(counts)]:
        counts[domain] += 1
    order: list[int] = []
    offset = 0
    for domain, (size, count) in enumerate(zip(sizes, counts, strict=True)):
        taken: list[int] = []
        turn = 0
        while len(taken) < count:
            once = list(range(offset, offset + size))
            random.Random(f"{seed} {epoch} {domain} {turn}").shuffle(once)
            taken += once
            turn += 1
        order += taken[:count]
        offset += size
    random.Random(f"{seed} {epoch}").shuffle(order)
    return order


def bucketed(order: Sequence[int], lengths: Sequence[int], batch_size: int, seed: int, epoch: int) -> list[int]:
    """Returns the same positions, rearranged within windows of WINDOW batches so that a batch holds similar lengths."""
    shuffle = random.Random(f"{seed} {epoch} batches").shuffle
    result: list[int] = []
    for start in range(0, len(order), WINDOW * batch_size):
        window = sorted(order[start : start + WINDOW * batch_size], key=lambda position: lengths[position])
        batches = [window[i : i + batch_size] for i in range(0, len(window), batch_size)]
        tail = [batches.pop()] if len(batches[-1]) < batch_size else []
        shuffle(batches)
        result += [position for batch in batches + tail for position in batch]
    return result


class MixtureSampler(Sampler[int]):
    """Yields the positions of one epoch after another.

    Args:
        sizes: number of examples of each domain, in the order they are concatenated.
        shares: of each domain, from `domain_shares`.
        lengths: tokens of each example.
        batch_size: rows of one micro-batch.
        seed: of the order.
        length: positions of one epoch; the number of examples by default.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        shares: Sequence[float],
        lengths: Sequence[int],
        batch_size: int,
        seed: int,
        length: int | None = None,
    ) -> None:
        self.sizes, self.shares, self.lengths = list(sizes), list(shares), list(lengths)
        self.batch_size, self.seed, self.epoch = batch_size, seed, 0
        self.length = length if length is not None else sum(self.sizes)

    def set_epoch(self, epoch: int) -> None:
        """Called by the training loop before each epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[int]:
        order = mixed_order(self.sizes, self.shares, self.length, self.seed, self.epoch)
        return iter(bucketed(order, self.lengths, self.batch_size, self.seed, self.epoch))
