"""Whole feed-forward blocks as experts: fused halves against plain ones, and both against the paper's equation."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from loramix.experts.bank import LoraBank
from loramix.experts.config import BankConfig
from loramix.routing import Routing

WIDE, NARROW, EXPERTS = 12, 8, 4


def _banks(share: str | None, backend: str) -> tuple[LoraBank, LoraBank]:
    torch.manual_seed(1)
    how = {"num_experts": EXPERTS, "rank": 2, "scaling": 1.3, "init_weights": False}
    first = LoraBank(NARROW, WIDE, form=BankConfig(share=share), backend=backend, **how)
    second = LoraBank(WIDE, NARROW, form=BankConfig(share=share), backend=backend, **how)
    return first.double(), second.double()


def _layers(bias: bool) -> tuple[nn.Linear, nn.Linear]:
    torch.manual_seed(2)
    return (
        nn.Linear(NARROW, WIDE, bias=bias).double().requires_grad_(False),
        nn.Linear(WIDE, NARROW, bias=bias).double().requires_grad_(False),
    )


def _routing(logits_NE: torch.Tensor, k: int | None) -> Routing:
    probabilities_NE = logits_NE.softmax(dim=1)
    weights, ids = (probabilities_NE, None) if k is None else probabilities_NE.topk(k, dim=1)
    mask = torch.ones(len(logits_NE), dtype=torch.bool)
    return Routing(ids, weights, logits_NE, "token", mask, probabilities_NE)


def _outcome(share: str | None, backend: str, bias: bool, k: int | None) -> list[torch.Tensor]:
    (first, second), (up, down) = _banks(share, backend), _layers(bias)
    torch.manual_seed(3)
    x = torch.randn(2, 5, NARROW, dtype=torch.float64, requires_grad=True)
    logits = torch.randn(10, EXPERTS, dtype=torch.float64, requires_grad=True)
    routing = _routing(logits, k)
    y = second.contract(down, F.silu(first.expand(up, x, routing)), routing)
    swing = torch.arange(y.numel(), dtype=y.dtype).view_as(y).cos()
    return [y, *torch.autograd.grad((y * swing).sum(), [x, logits, *first.parameters(), *second.parameters()])]


@pytest.mark.parametrize("share", [None, "down", "up"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("k", [1, 2, None])
def test_fused_halves_agree_with_plain_ones(share, bias, k):
    for got, wanted in zip(_outcome(share, "auto", bias, k), _outcome(share, "loop", bias, k), strict=True):
        torch.testing.assert_close(got, wanted)


def test_halves_are_the_equation():
    """sum_k g_k E_{e_k}(x) with each expert's own W', written out token by token."""
    (first, second), (up, down) = _banks(None, "auto"), _layers(True)
    torch.manual_seed(3)
    x = torch.randn(1, 4, NARROW, dtype=torch.float64, requires_grad=True)
    routing = _routing(torch.randn(4, EXPERTS, dtype=torch.float64), 2)
    got = second.contract(down, F.silu(first.expand(up, x, routing)), routing)
    for n in range(4):
        total = torch.zeros(NARROW, dtype=torch.float64)
        for e, g in zip(routing.ids[n].tolist(), routing.weights[n], strict=True):
            inner = F.silu((up.weight + 1.3 * first.B_EOR[e] @ first.A_ERI[e]) @ x[0, n] + up.bias)
            total = total + g * ((down.weight + 1.3 * second.B_EOR[e] @ second.A_ERI[e]) @ inner + down.bias)
        torch.testing.assert_close(got[0, n], total)


def test_grouped_and_concat_agree():
    torch.manual_seed(0)
    results = []
    for backend in ("grouped", "concat"):
        torch.manual_seed(1)
        how = {"num_experts": EXPERTS, "rank": 4, "scaling": 1.3, "init_weights": False, "backend": backend}
        first, second = LoraBank(NARROW, WIDE, **how), LoraBank(WIDE, NARROW, **how)
        up, down = (layer.float() for layer in _layers(True))
        x = torch.randn(2, 5, NARROW, requires_grad=True)
        routing = _routing(torch.randn(10, EXPERTS), 2)
        y = second.contract(down, F.gelu(first.expand(up, x, routing)), routing)
        results.append([y, *torch.autograd.grad(y.square().sum(), [x, *first.parameters(), *second.parameters()])])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_weights_need_not_sum_to_one_for_the_bias():
    """The frozen bias belongs to each expert, so it is weighed with it: sum_k g_k b, not b."""
    (first, second), (up, down) = _banks(None, "auto"), _layers(True)
    x = torch.randn(1, 3, NARROW, dtype=torch.float64, requires_grad=True)
    logits = torch.randn(3, EXPERTS, dtype=torch.float64)
    weights, ids = logits.softmax(dim=1).topk(2, dim=1)
    mask = torch.ones(3, dtype=torch.bool)
    routing = Routing(ids, 0 * weights, logits, "token", mask, logits.softmax(dim=1))
    got = second.contract(down, F.silu(first.expand(up, x, routing)), routing)
    torch.testing.assert_close(got, torch.zeros_like(got))
