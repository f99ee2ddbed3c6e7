"""Counting FLOPs: torch's counter, and the products it leaves out."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

Shape = tuple[int, ...]
aten = torch.ops.aten


def counting() -> FlopCounterMode:
    """Returns torch's counter of floating-point operations, to be entered: a multiplication and an addition are two.

    torch 2.13 leaves out products that are added in place (how experts are added to the base's output), grouped
    products and a processor's attention; here they count. Attention counts whole, causal or not, as in torch. Modules
    are not told apart.
    """
    counter = FlopCounterMode(
        display=False,
        custom_mapping={
            aten.addmm_: _added,
            aten.baddbmm_: _added_by_batch,
            aten._grouped_mm: _grouped,
            aten._scaled_dot_product_flash_attention_for_cpu: _attention,
            aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
        },
    )
    counter.mod_tracker = _Everywhere()  # type: ignore[assignment]
    return counter


class _Everywhere:
    """Stands in for torch's tracker of modules, whose hooks hold all that checkpointed layers compute again until the
    backward has ended, so that nobody could see what such a step takes."""

    parents = frozenset({"Global"})

    def __enter__(self) -> None:
        """Nothing is hooked."""

    def __exit__(self, *_: object) -> None:
        """Nothing was hooked."""


def _added(_: Shape, left: Shape, right: Shape, *args: Any, **kwargs: Any) -> int:
    return 2 * left[0] * left[1] * right[1]


def _added_by_batch(_: Shape, left: Shape, right: Shape, *args: Any, **kwargs: Any) -> int:
    return 2 * left[0] * left[1] * left[2] * right[2]


def _grouped(left: Shape, right: Shape, *args: Any, **kwargs: Any) -> int:
    """Rows in groups times a matrix each, (M, K) (E, K, N), or sums over rows by group, (K, M) (M, N)."""
    return 2 * left[0] * left[1] * right[-1]


def _attention(query: Shape, key: Shape, value: Shape, *args: Any, **kwargs: Any) -> int:
    return int(sdpa_flop_count(query, key, value))  # type: ignore[no-untyped-call]


def _attention_backward(grad: Shape, query: Shape, key: Shape, value: Shape, *args: Any, **kwargs: Any) -> int:
    return int(sdpa_backward_flop_count(grad, query, key, value))  # type: ignore[no-untyped-call]
