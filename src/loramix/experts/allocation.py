"""How many experts each layer has.

    uniform   num_experts everywhere
    "2468"    MoLA's word: one digit for each part of the depth, here four quarters, first layers first
    [2, 2, 4] one number for each layer

Layer l of L belongs to part floor(l * P / L) of P: parts are equal where L divides by P, and otherwise differ by one
(30 layers in quarters: 8, 7, 8, 7). MoLA (Gao et al. 2024, section 5.1) and MoSLD use 32 layers in quarters of 8.
"""

from __future__ import annotations

from collections.abc import Sequence

Allocation = str | Sequence[int] | None


def allocation_problem(allocation: Allocation) -> str | None:
    """Returns what is wrong with an allocation whatever the base, or None."""
    if allocation is None or allocation == "uniform":
        return None
    if isinstance(allocation, str):
        if allocation.isdigit() and "0" not in allocation:
            return None
        return (
            f"allocation = {allocation!r}: expected 'uniform', digits for the parts of the depth such as '2468', or a "
            "list with a number for each layer. Each at least 1."
        )
    if not allocation or any(not isinstance(count, int) or count < 1 for count in allocation):
        return f"allocation = {list(allocation)}: expected a number of experts for each layer, at least 1."
    return None


def extremes(allocation: Allocation, num_experts: int) -> tuple[int, int]:
    """Returns the fewest and the most experts any layer has."""
    if allocation is None or allocation == "uniform":
        return num_experts, num_experts
    counts = [int(count) for count in allocation]
    return min(counts), max(counts)


def experts_per_layer(allocation: Allocation, num_experts: int, layers: int) -> list[int]:
    """Returns the number of experts of each of `layers` layers.

    Raises:
        ValueError: a list of another length, or more parts than layers; the message says what was expected.
    """
    if allocation is None or allocation == "uniform":
        return [num_experts] * layers
    if isinstance(allocation, str):
        if len(allocation) > layers:
            raise ValueError(
                f"allocation = {allocation!r} cuts the depth into {len(allocation)} parts, but the base has {layers} "
                "layers. Use fewer digits."
            )
        return [int(allocation[layer * len(allocation) // layers]) for layer in range(layers)]
    if len(allocation) != layers:
        raise ValueError(
            f"allocation lists {len(allocation)} layers, but the base has {layers}. Give one number for each."
        )
    return list(allocation)
