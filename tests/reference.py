"""The stupid loops: MoA written from its equations, one token, one expert and one layer at a time, in fp64.

Shares no code with loramix: the base's own layers are run with plain Python functions in place of its linears.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


def lora_delta(x_I: Tensor, down_RI: Tensor, up_OR: Tensor, scaling: float) -> Tensor:
    """scaling * B A x for one token."""
    code = [sum(down_RI[r, i] * x_I[i] for i in range(len(x_I))) for r in range(len(down_RI))]
    return torch.stack([scaling * sum(up_OR[o, r] * code[r] for r in range(len(code))) for o in range(len(up_OR))])


def mixture_delta(x_I: Tensor, A_ERI: Tensor, B_EOR: Tensor, gates_E: Tensor, scaling: float) -> Tensor:
    """sum_e g_e * scaling * B_e A_e x for one token."""
    total = torch.zeros(B_EOR.shape[1], dtype=x_I.dtype)
    for e in range(len(A_ERI)):
        total = total + gates_E[e] * lora_delta(x_I, A_ERI[e], B_EOR[e], scaling)
    return total


def router_logits(state_I: Tensor, w_in_HI: Tensor, w_out_EH: Tensor) -> Tensor:
    """W2 tanh(W1 h) for one pooled state."""
    hidden = [torch.tanh((w_in_HI[h] * state_I).sum()) for h in range(len(w_in_HI))]
    return torch.stack([sum(w_out_EH[e, h] * hidden[h] for h in range(len(hidden))) for e in range(len(w_out_EH))])


def cross_entropy(logits_E: Tensor, label: int) -> Tensor:
    top = logits_E.max()
    return top + torch.log(torch.exp(logits_E - top).sum()) - logits_E[label]


class LabelledExpert(nn.Module):
    """A frozen linear with one expert per row of the batch, applied by `lora_delta` token by token."""

    def __init__(self, base: nn.Linear, A_ERI: Tensor, B_EOR: Tensor, scaling: float, labels: list[int]) -> None:
        super().__init__()
        self.base, self.A_ERI, self.B_EOR, self.scaling, self.labels = base, A_ERI, B_EOR, scaling, labels
        self.seen: Tensor | None = None

    def forward(self, x_BTI: Tensor) -> Tensor:
        self.seen = x_BTI
        rows = []
        for x_TI, label in zip(x_BTI, self.labels, strict=True):
            tokens = []
            for x_I in x_TI:
                tokens.append(self.base(x_I) + lora_delta(x_I, self.A_ERI[label], self.B_EOR[label], self.scaling))
            rows.append(torch.stack(tokens))
        return torch.stack(rows)
