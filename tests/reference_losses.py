"""The auxiliary losses written from their equations, one token, one pair at a time. Shares no code with loramix."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from tests.reference_methods import Book, Choice, Page


def _real(page: Page, mask_BT: Tensor) -> Iterator[tuple[int, Choice]]:
    """Yields (row, choice) of all tokens that are no padding."""
    for b, row in enumerate(page):
        for t, choice in enumerate(row):
            if bool(mask_BT[b, t]):
                yield b, choice


def load_balance(book: Book, mask_BT: Tensor) -> Tensor:
    """E * sum_e f_e P_e, mean over routers (Switch, eq. 4); f counts every choice of a token."""
    losses = []
    for page in book.pages.values():
        choices = [choice for _, choice in _real(page, mask_BT)]
        experts = len(choices[0].probabilities)
        total = sum(len(choice.chosen) for choice in choices)
        loss = 0.0
        for e in range(experts):
            f = sum(choice.chosen.count(e) for choice in choices) / total
            loss = loss + f * sum(choice.probabilities[e] for choice in choices) / len(choices)
        losses.append(experts * loss)
    return sum(losses) / len(losses)


def router_z(book: Book, mask_BT: Tensor) -> Tensor:
    """Mean over tokens of (log sum_e exp z_e)^2, mean over routers (ST-MoE, eq. 5)."""
    losses = []
    for page in book.pages.values():
        squares = [torch.log(torch.exp(choice.logits).sum()) ** 2 for _, choice in _real(page, mask_BT)]
        losses.append(sum(squares) / len(squares))
    return sum(losses) / len(losses)


def gate_balance(book: Book, mask_BT: Tensor) -> Tensor:
    """-log prod_e q_e, q_e the mean weight of expert e over gates and tokens (MoLE, eq. 12)."""
    of_gates = []
    for page in book.pages.values():
        gates = [choice.probabilities for _, choice in _real(page, mask_BT)]
        of_gates.append(sum(gates) / len(gates))
    q_E = sum(of_gates) / len(of_gates)
    return -torch.log(math.prod(q_E))


def localized_balance(
    book: Book, mask_BT: Tensor, kinds: Sequence[int], *, squared: bool = False, delta: float = 0.1
) -> Tensor:
    """var(Z) / mean(Z) over all experts and rows, Z = I * Q (LoRAMoE's paper); squared: the authors' code, which has
    1 + delta where group and kind differ, the unbiased variance, and mean(Z)^2."""
    losses = []
    for page in book.pages.values():
        experts = len(page[0][0].probabilities)
        Z = []
        for b, kind in enumerate(kinds):
            here = [choice for row, choice in _real(page, mask_BT) if row == b]
            for e in range(experts):
                group = 0 if e < experts / 2 else 1
                push = 1 + delta if (group == kind) != squared else 1 - delta
                Z.append(push * sum(choice.probabilities[e] for choice in here))
        mean = sum(Z) / len(Z)
        variance = sum((z - mean) ** 2 for z in Z) / (len(Z) - 1 if squared else len(Z))
        losses.append(variance / (mean**2 if squared else mean))
    return sum(losses) / len(losses)


def info_nce(outputs: Sequence[tuple[int, Tensor]], temperature: float = 0.1) -> Tensor:
    """Mean over outputs that have another of their expert of -log(sum over those / sum over all others)."""

    def alike(one: Tensor, other: Tensor) -> Tensor:
        cosine = (one * other).sum() / torch.sqrt((one * one).sum()) / torch.sqrt((other * other).sum())
        return torch.exp(cosine / temperature)

    losses = []
    for i, (expert, one) in enumerate(outputs):
        others = [(e, alike(one, other)) for j, (e, other) in enumerate(outputs) if j != i]
        same = [value for e, value in others if e == expert]
        if same:
            losses.append(-torch.log(sum(same) / sum(value for _, value in others)))
    return sum(losses) / len(losses)


def contrastive(book: Book, mask_BT: Tensor, temperature: float = 0.1) -> Tensor:
    """InfoNCE over the outputs of the chosen experts, mean over modules."""
    losses = []
    for outputs in book.outputs.values():
        real = [(e, output) for (b, t, e), output in outputs.items() if bool(mask_BT[b, t])]
        losses.append(info_nce(real, temperature))
    return sum(losses) / len(losses)


def few_shot(losses: Sequence[float], weights: Sequence[float], l1: float = 0.05) -> float:
    """Mean loss of the examples + l1 * mean |w| (LoRAHub, section 3.3)."""
    return sum(losses) / len(losses) + l1 * sum(abs(w) for w in weights) / len(weights)
