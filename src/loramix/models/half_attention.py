"""Attention in 16 bits on a processor, whose backward is worked out in fp32.

torch's own backward in bfloat16 takes longer there than the one in fp32, on short rows several times as long, also
where the processor has products in bfloat16 (docs/log.md). The forward is left as it is. Tensors in fp32 are
there for one row at a time.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from loramix.precision import HALVES

aten = torch.ops.aten


def attends_in_halves(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether this attention is one whose backward is better worked out in fp32: 16 bits, on a processor, learning; of
    tensors that torch's operation takes as they are, without what scaled_dot_product_attention does for it first."""
    asis = query.shape[-1] == key.shape[-1] == value.shape[-1] and query.stride(-1) == key.stride(-1) == 1
    if not asis or value.stride(-1) != 1:
        return False
    learns = torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad)
    halves = query.dtype in HALVES and query.dtype == key.dtype == value.dtype
    return learns and halves and query.device.type == "cpu" and not torch.compiler.is_compiling()


def half_attention(query_BHTD: Tensor, key_BGTD: Tensor, value_BGTD: Tensor, scaling: float | None) -> Tensor:
    """Returns causal attention as scaled_dot_product_attention, (B, H, T, D); H is a multiple of G.

    Args:
        query_BHTD, key_BGTD, value_BGTD: bfloat16 or float16.
        scaling: of the scores; None for 1 / sqrt(D).
    """
    out_BHTD: Tensor = _HalfAttention.apply(  # type: ignore[no-untyped-call]
        query_BHTD, key_BGTD, value_BGTD, scaling
    )
    return out_BHTD


class _HalfAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, scaling: float | None) -> Tensor:
        out, log_sums = aten._scaled_dot_product_flash_attention_for_cpu(query, key, value, 0.0, True, scale=scaling)
        ctx.save_for_backward(query, key, value, out, log_sums)
        ctx.scaling = scaling
        kept: Tensor = out
        return kept

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, out, log_sums = ctx.saved_tensors
        wide = [one.float() for one in (grad, query, key, value, out)]
        grads = aten._scaled_dot_product_flash_attention_for_cpu_backward(*wide, log_sums, 0.0, True, scale=ctx.scaling)
        return (*(one.to(query.dtype) for one in grads), None)
