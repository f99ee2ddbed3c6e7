"""The mixtures written from their equations, in fp64: one row, one token, one expert at a time.

Shares no code with loramix. The frozen linears of a base are replaced by the modules below; each asks the `Book` what
the router at the door of its scope decided for the token, and adds the chosen experts' deltas one after the other.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

Output = Callable[[int, Tensor], Tensor]
"""s B_e A_e x of expert e for one token."""


@dataclass
class Choice:
    """What a router decided for one token.

    Attributes:
        chosen: the experts it chose, whether they then had room or not.
        weights: of the experts that take part.
        logits, probabilities: over all experts, where the router has them.
    """

    chosen: list[int]
    weights: dict[int, Tensor]
    logits: Tensor | None = None
    probabilities: Tensor | None = None


Page = list[list[Choice]]
"""Rows of tokens."""
Router = Callable[[Tensor, Output], Page]


@dataclass
class Book:
    """What all routers of one forward decided, by scope, and what all experts put out, by module."""

    pages: dict[str, Page] = field(default_factory=dict)
    outputs: dict[str, dict[tuple[int, int, int], Tensor]] = field(default_factory=dict)


# ---- routers ---------------------------------------------------------------------------------------------------------


def scores(x_I: Tensor, w_EI: Tensor) -> Tensor:
    return torch.stack([(w_I * x_I).sum() for w_I in w_EI])


def softmax(scores_E: Tensor) -> Tensor:
    top = scores_E.max().detach()
    powers = [torch.exp(score - top) for score in scores_E]
    return torch.stack([power / sum(powers) for power in powers])


def largest(values: Tensor, k: int) -> list[int]:
    numbers = values.tolist()
    return sorted(range(len(numbers)), key=lambda e: -numbers[e])[:k]


def each_token(rule: Callable[[Tensor, Output], Choice]) -> Router:
    return lambda x_BTI, output: [[rule(x_I, output) for x_I in x_TI] for x_TI in x_BTI]


def top_k(w_EI: Tensor, k: int, weighting: str = "renormalised") -> Router:
    """p = softmax(W x); the K largest; p / sum of the chosen, or p itself, or 1."""

    def rule(x_I: Tensor, _: Output) -> Choice:
        logits = scores(x_I, w_EI)
        p = softmax(logits)
        ids = largest(p, k)
        weight = {
            "renormalised": {e: p[e] / sum(p[i] for i in ids) for e in ids},
            "probability": {e: p[e] for e in ids},
            "one": {e: torch.ones((), dtype=x_I.dtype) for e in ids},
        }[weighting]
        return Choice(ids, weight, logits, p)

    return each_token(rule)


def soft(w_EI: Tensor) -> Router:
    """p = softmax(W x), all experts."""

    def rule(x_I: Tensor, _: Output) -> Choice:
        logits = scores(x_I, w_EI)
        p = softmax(logits)
        return Choice(list(range(len(p))), dict(enumerate(p)), logits, p)

    return each_token(rule)


def capacity(
    w_EI: Tensor,
    k: int,
    mask_BT: Tensor,
    *,
    factor: float | None,
    kept_BTE: Tensor | None = None,
    drop: float = 0.0,
    renormalised: bool = False,
) -> Router:
    """g = TopK(Dropout(softmax(W x)), K); within a row, in order, an expert takes ceil(factor K T / E) tokens at most.

    Args:
        kept_BTE: the gates that the dropout left, and with `drop` by which 1 / (1 - drop) they are scaled.
    """
    experts = len(w_EI)

    def route(x_TI: Tensor, real_T: Tensor, kept_TE: Tensor | None) -> list[Choice]:
        room = math.inf if factor is None else math.ceil(factor * k * int(real_T.sum()) / experts)
        taken = [0] * experts
        choices = []
        for t, x_I in enumerate(x_TI):
            logits = scores(x_I, w_EI)
            gates = softmax(logits)
            if kept_TE is not None:
                gates = torch.stack([g * float(m) / (1 - drop) for g, m in zip(gates, kept_TE[t], strict=True)])
            ids = largest(gates, k)
            total = sum(gates[e] for e in ids) if renormalised else 1.0
            weights = {}
            for e in ids:
                if bool(real_T[t]):
                    taken[e] += 1
                if taken[e] <= room:
                    weights[e] = gates[e] / total
            choices.append(Choice(ids, weights, logits, gates))
        return choices

    def decide(x_BTI: Tensor, _: Output) -> Page:
        kept: Sequence[Tensor | None] = [None] * len(x_BTI) if kept_BTE is None else list(kept_BTE)
        return [route(x_TI, real_T, one) for x_TI, real_T, one in zip(x_BTI, mask_BT, kept, strict=True)]

    return decide


def task(embedding_DH: Tensor, w_EH: Tensor, domains: Sequence[int]) -> Router:
    """omega = softmax(W e_task): the same for all tokens of a row, whatever they are."""

    def decide(x_BTI: Tensor, _: Output) -> Page:
        page = []
        for x_TI, domain in zip(x_BTI, domains, strict=True):
            logits = scores(embedding_DH[domain], w_EH)
            p = softmax(logits)
            page.append([Choice(list(range(len(p))), dict(enumerate(p)), logits, p) for _ in x_TI])
        return page

    return decide


def main_directions(A_ERI: Tensor, B_EOR: Tensor) -> Tensor:
    """The top right singular vector of each B_e A_e, from the whole (O, I) product."""
    return torch.stack([torch.linalg.svd(B @ A)[2][0] for A, B in zip(A_ERI, B_EOR, strict=True)])


def prototype(vectors_EI: Tensor, k: int, temperature: float = 1.0) -> Router:
    """The K largest |x . v_e|, weighted by their softmax."""

    def rule(x_I: Tensor, _: Output) -> Choice:
        sizes = torch.stack([abs((v_I * x_I).sum()) / temperature for v_I in vectors_EI])
        ids = largest(sizes, k)
        weights = softmax(torch.stack([sizes[e] for e in ids]))
        return Choice(ids, dict(zip(ids, weights, strict=True)), sizes, softmax(sizes))

    return each_token(rule)


def over_outputs(w_EX: Tensor, log_temperature: Tensor) -> Router:
    """z = normalise(outputs side by side), g = softmax(W z / tau)."""

    def rule(x_I: Tensor, output: Output) -> Choice:
        side_by_side = torch.cat([output(e, x_I) for e in range(len(w_EX))])
        centred = side_by_side - side_by_side.sum() / len(side_by_side)
        variance = (centred * centred).sum() / len(centred)
        logits = scores(centred / torch.sqrt(variance + 1e-5), w_EX) / torch.exp(log_temperature)
        g = softmax(logits)
        return Choice(list(range(len(g))), dict(enumerate(g)), logits, g)

    return each_token(rule)


def constant(weights_E: Tensor) -> Router:
    """The same numbers for every token."""
    return each_token(lambda *_: Choice(list(range(len(weights_E))), dict(enumerate(weights_E))))


# ---- modules ---------------------------------------------------------------------------------------------------------


class PlainLinear(nn.Module):
    """W0 x + s B A (x * left); `left_BTI` is what the dropout on the experts' input left, scaled; all ones without."""

    def __init__(self, base: nn.Linear, A_RI: Tensor, B_OR: Tensor, scaling: float) -> None:
        super().__init__()
        self.base, self.A_RI, self.B_OR, self.scaling = base, A_RI, B_OR, scaling
        self.left_BTI: Tensor | None = None

    def forward(self, x_BTI: Tensor) -> Tensor:
        left_BTI = torch.ones_like(x_BTI) if self.left_BTI is None else self.left_BTI
        rows = []
        for x_TI, left_TI in zip(x_BTI, left_BTI, strict=True):
            tokens = zip(x_TI, left_TI, strict=True)
            rows.append([self.base(x) + self.scaling * self.B_OR @ (self.A_RI @ (x * left)) for x, left in tokens])
        return torch.stack([torch.stack(row) for row in rows])


class MixedLinear(nn.Module):
    """W0 x + sum_e g_e s B_e A_e (x * left); a list of one A or one B is shared by all experts. The router sees x."""

    def __init__(self, base: nn.Linear, A: Tensor, B: Tensor, scaling: float, place: tuple[Book, str, str]) -> None:
        super().__init__()
        self.base, self.A, self.B, self.scaling = base, A, B, scaling
        self.book, self.scope, self.name = place
        self.router: Router | None = None
        self.left_BTI: Tensor | None = None

    def output(self, e: int, x_I: Tensor) -> Tensor:
        A_RI = self.A[e] if len(self.A) > 1 else self.A[0]
        B_OR = self.B[e] if len(self.B) > 1 else self.B[0]
        return self.scaling * (B_OR @ (A_RI @ x_I))

    def forward(self, x_BTI: Tensor) -> Tensor:
        if self.router is not None:
            self.book.pages[self.scope] = self.router(x_BTI, self.output)
        page = self.book.pages[self.scope]
        kept = self.book.outputs.setdefault(self.name, {})
        rows = []
        for b, x_TI in enumerate(x_BTI):
            tokens = []
            for t, x_I in enumerate(x_TI):
                y_O = self.base(x_I)
                left_I = 1.0 if self.left_BTI is None else self.left_BTI[b, t]
                for e, weight in page[b][t].weights.items():
                    kept[b, t, e] = self.output(e, x_I * left_I)
                    y_O = y_O + weight * kept[b, t, e]
                tokens.append(y_O)
            rows.append(torch.stack(tokens))
        return torch.stack(rows)


class SummedLinear(MixedLinear):
    """W0 x + s (sum_e w_e B_e)(sum_e w_e A_e) x: the matrices are summed, not the outputs (LoRAHub)."""

    def forward(self, x_BTI: Tensor) -> Tensor:
        if self.router is not None:
            self.book.pages[self.scope] = self.router(x_BTI, self.output)
        weights = self.book.pages[self.scope][0][0].weights
        A_RI = sum(w * self.A[e] for e, w in weights.items())
        B_OR = sum(w * self.B[e] for e, w in weights.items())
        summed = PlainLinear(self.base, A_RI, B_OR, self.scaling)
        summed.left_BTI = self.left_BTI
        return summed(x_BTI)


class MixedFFN(nn.Module):
    """sum_k g_k E_k(x), each E_k a whole block with its own W1', W2', W3' (MixLoRA, eq. 4-7)."""

    def __init__(self, parts: dict[str, MixedLinear]) -> None:
        super().__init__()
        self.gate, self.up, self.down = parts["gate_proj"], parts["up_proj"], parts["down_proj"]

    def expert(self, e: int, x_I: Tensor) -> Tensor:
        def changed(part: MixedLinear, v: Tensor) -> Tensor:
            return part.base(v) + part.output(e, v)

        gate_F = changed(self.gate, x_I)
        return changed(self.down, gate_F / (1 + torch.exp(-gate_F)) * changed(self.up, x_I))

    def forward(self, x_BTI: Tensor) -> Tensor:
        page = self.gate.router(x_BTI, self.gate.output)
        self.gate.book.pages[self.gate.scope] = page
        rows = []
        for b, x_TI in enumerate(x_BTI):
            rows.append([sum(w * self.expert(e, x) for e, w in page[b][t].weights.items()) for t, x in enumerate(x_TI)])
        return torch.stack([torch.stack(row) for row in rows])
