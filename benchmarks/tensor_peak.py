"""The most that the tensors of a step take, to the byte, from torch's allocator."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate
from typing import Any

from torch.profiler import ProfilerActivity, profile

MIB = 2**20


def tensor_peak(step: Callable[[], object]) -> float:
    """Takes one step and returns the most that tensors made in it took at a time, in MiB. A processor's only.

    The profiler remembers addresses of earlier sessions: the end of a tensor that was made between two of them, at such
    an address, is told as if memory that this session took were given back. What it did not see made is left out.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        step()
    events = list(_allocations(profiled.profiler.kineto_results.experimental_event_tree()))
    events.sort(key=lambda event: event.start_time_ns)
    made: dict[int, int] = {}
    sizes: list[int] = []
    for event in events:
        address, size = event.extra_fields.ptr, event.extra_fields.alloc_size
        if size > 0:
            made[address] = size
            sizes.append(size)
        elif address in made:
            sizes.append(-made.pop(address))
    return max(accumulate(sizes), default=0) / MIB


def _allocations(events: Sequence[Any]) -> Iterator[Any]:
    left = list(events)
    while left:
        event = left.pop()
        left += event.children
        if event.name == "[memory]":
            yield event
