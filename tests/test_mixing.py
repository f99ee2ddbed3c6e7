"""The order of examples: right shares, nothing left out, the same for the same seed whatever the workers."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from loramix.data.mixing import MixtureSampler, bucketed, domain_shares, mixed_order

SIZES = {"a": 90, "b": 10}


@pytest.mark.parametrize(
    ("mixing", "given_", "wanted"),
    [
        ("proportional", {}, 0.9),
        ("uniform", {}, 0.5),
        ("temperature", {"temperature": 2.0}, 0.75),
        ("weights", {"weights": {"a": 1, "b": 3}}, 0.25),
    ],
)
def test_shares(mixing, given_, wanted):
    shares = domain_shares(SIZES, mixing, **given_)
    assert shares["a"] == pytest.approx(wanted)
    assert sum(shares.values()) == pytest.approx(1)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 30), min_size=1, max_size=5), st.integers(0, 100), st.integers(0, 3))
def test_proportional_sees_every_example_once(sizes, seed, epoch):
    shares = [size / sum(sizes) for size in sizes]
    order = mixed_order(sizes, shares, sum(sizes), seed, epoch)
    assert sorted(order) == list(range(sum(sizes)))
    assert sorted(bucketed(order, list(range(sum(sizes))), 4, seed, epoch)) == list(range(sum(sizes)))


def test_no_example_is_repeated_before_all_were_seen():
    order = mixed_order([3, 50], [0.5, 0.5], 40, 0, 0)
    small = [position for position in order if position < 3]
    assert len(small) == 20
    assert max(small.count(i) for i in range(3)) - min(small.count(i) for i in range(3)) <= 1


def test_order_depends_on_seed_and_epoch_only():
    def order(seed: int, epoch: int, workers: int = 0) -> list[int]:
        sampler = MixtureSampler([40, 8], [0.5, 0.5], list(range(48)), 4, seed)
        sampler.set_epoch(epoch)
        loader = DataLoader(list(range(48)), batch_size=4, sampler=sampler, num_workers=workers)
        return torch.cat(list(loader)).tolist()

    assert order(0, 0) == order(0, 0) == order(0, 0, workers=2)
    assert order(0, 0) != order(1, 0)
    assert order(0, 0) != order(0, 1)


def test_batches_hold_similar_lengths():
    lengths = [(i * 37) % 100 for i in range(128)]
    order = mixed_order([128], [1.0], 128, 0, 0)

    def padded(positions: list[int]) -> int:
        return sum(4 * max(lengths[p] for p in positions[i : i + 4]) for i in range(0, 128, 4))

    assert padded(bucketed(order, lengths, 4, 0, 0)) < 0.75 * padded(order)
