"""The loss of a frozen language-model head, some rows at a time: no tensor of all rows by the whole vocabulary.

A head of 49,152 words on 1,024 tokens is 200 MB of logits, as much of their softmax, and as much of gradients. Each
token's loss depends on its own state alone, so the gradient by that state can be worked out with the loss, while its
logits are there, and only be multiplied later.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def head_nll(states_NH: Tensor, weight_VH: Tensor, bias_V: Tensor | None, targets_N: Tensor, chunk: int) -> Tensor:
    """Returns the negative log-likelihood of each target in nats, fp32 (N,).

    The same as cross_entropy(linear(states, weight, bias), targets, reduction="none"); neither weight nor bias gets a
    gradient. Products are worked out in the states' type, as autocast would have it, sums in fp32.

    Args:
        states_NH: last states, (N, H).
        weight_VH: of the head, (V, H), any type.
        bias_V: of the head, or None.
        targets_N: words, int64 (N,).
        chunk: rows at a time.
    """
    nll_N: Tensor = _HeadNll.apply(  # type: ignore[no-untyped-call]
        states_NH, weight_VH.detach(), bias_V, targets_N, chunk
    )
    return nll_N


class _HeadNll(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, states_NH: Tensor, weight_VH: Tensor, bias_V: Tensor | None, targets_N: Tensor, chunk: int
    ) -> Tensor:
        wanted = ctx.needs_input_grad[0]
        weight_VH = weight_VH.to(states_NH.dtype)
        bias_V = None if bias_V is None else bias_V.to(states_NH.dtype)
        nll_N = torch.empty(len(states_NH), dtype=torch.float32, device=states_NH.device)
        slopes_NH = torch.empty_like(states_NH) if wanted else None
        # The same memory for all chunks: on a processor each anew would take longer to be had than to be worked on.
        product_CV = states_NH.new_empty(min(chunk, len(states_NH)), len(weight_VH))
        logits_CV = product_CV.float()
        for start in range(0, len(states_NH), chunk):
            part = slice(start, start + chunk)
            states_CH, targets_C1 = states_NH[part], targets_N[part, None]
            own_CV, wide_CV = product_CV[: len(states_CH)], logits_CV[: len(states_CH)]
            if bias_V is None:
                torch.mm(states_CH, weight_VH.T, out=own_CV)
            else:
                torch.addmm(bias_V, states_CH, weight_VH.T, out=own_CV)
            if wide_CV.dtype != own_CV.dtype:
                wide_CV.copy_(own_CV)
            wide_CV.sub_(wide_CV.amax(dim=1, keepdim=True))
            targeted_C1 = wide_CV.gather(1, targets_C1)
            sum_C1 = wide_CV.exp_().sum(dim=1, keepdim=True)
            nll_N[part] = (sum_C1.log() - targeted_C1).squeeze(1)
            if slopes_NH is not None:
                wide_CV.div_(sum_C1).scatter_add_(1, targets_C1, torch.full_like(sum_C1, -1.0))
                if wide_CV.dtype != own_CV.dtype:
                    own_CV.copy_(wide_CV)
                torch.mm(own_CV, weight_VH, out=slopes_NH[part])
        ctx.save_for_backward(slopes_NH)
        return nll_N

    @staticmethod
    def backward(ctx: Any, grad_N: Tensor) -> tuple[Tensor | None, None, None, None, None]:
        (slopes_NH,) = ctx.saved_tensors
        return slopes_NH * grad_N[:, None].to(slopes_NH.dtype), None, None, None, None
