"""Stands in for a base's attention where there are shapes alone: true shapes, and what a flash kernel keeps."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from loramix.errors import ConfigError
from loramix.precision import HALVES

NAME = "loramix_dry_run"


class ShapesAttention:
    """An attention by transformers' interface.

    Args:
        share: of a row in the long row.
        rows: that it is gone through in, one by one.
        by_row: whether that is so; what it gives is then copied into one tensor.

    Attributes:
        flops: of attention within rows so far: two products of T x T by head, half of it causal; two and a half times
            that backward, where the scores are made again.
    """

    def __init__(self, share: float, rows: int, by_row: bool) -> None:
        self.share, self.rows, self.by_row, self.flops = share, rows, by_row, 0.0

    def __call__(
        self, module: nn.Module, query_BHTD: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **_: Any
    ) -> tuple[Tensor, None]:
        wide = self.by_row and query_BHTD.dtype in HALVES
        if torch.is_autocast_enabled("cpu"):  # which takes rotated queries and keys in fp32
            low = torch.get_autocast_dtype("cpu")
            query_BHTD, key, value = (one.to(low) for one in (query_BHTD, key, value))
        out_BHTD: Tensor = _Shapes.apply(query_BHTD, key, value, self, wide)  # type: ignore[no-untyped-call]
        out_BTHD = out_BHTD.transpose(1, 2).contiguous()
        return (out_BTHD.clone() if self.by_row else out_BTHD), None

    def count(self, query_BHTD: Tensor, value: Tensor, times: float) -> None:
        """Adds the FLOPs of one layer; values may be of another width than queries."""
        wide = query_BHTD.shape[3] + value.shape[3]
        self.flops += times * query_BHTD[..., 0].numel() * wide * query_BHTD.shape[2] * self.share

    def widened(self, *given: Tensor) -> list[Tensor]:
        """Returns one row of tensors in fp32."""
        return [one.new_empty(one.numel() // self.rows, dtype=torch.float32) for one in given]


@contextmanager
def attending(base: Any, attention: ShapesAttention) -> Iterator[None]:
    """Lets a base attend by `attention`, and says it in a line where it does not run on shapes alone."""
    before = base.config._attn_implementation
    AttentionInterface.register(NAME, attention)
    base.config._attn_implementation = NAME
    try:
        yield
    except (RuntimeError, NotImplementedError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"the plan: this base does not run on shapes alone ({str(error).splitlines()[0][:120]}). Train with "
            "max_steps=2 and look at the log instead."
        ) from error
    finally:
        base.config._attn_implementation = before


class _Shapes(torch.autograd.Function):
    """An attention of which only the shapes are true: keeps what a flash kernel keeps. `wide`: its backward is that of
    `models.half_attention`."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, attention: ShapesAttention, wide: bool) -> Tensor:
        out = query.new_empty(*query.shape[:3], value.shape[3])
        ctx.save_for_backward(query, key, value, out)
        ctx.attention, ctx.wide = attention, wide
        attention.count(query, value, 1)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, out = ctx.saved_tensors
        ctx.attention.count(query, value, 2.5)
        # Held until the gradients are there.
        _ = ctx.attention.widened(grad, query, key, value, out, query, key, value) if ctx.wide else []
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value), None, None
