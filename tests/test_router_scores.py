"""Scores of states in 16 bits: those of their copy in fp32, and its gradients, without keeping the copy."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional as F

from loramix.routers.scores import token_logits


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("of_weight", [torch.float32, torch.bfloat16])
def test_they_are_those_of_a_copy_in_fp32(dtype: torch.dtype, of_weight: torch.dtype):
    x = torch.randn(2, 5, 8).to(dtype).requires_grad_()
    w = torch.randn(3, 8).to(of_weight).requires_grad_()
    found, wanted = token_logits(x, w), F.linear(x.flatten(0, 1).float(), w.float())
    assert found.dtype == torch.float32
    assert torch.equal(found, wanted)
    slope = torch.randn(10, 3)
    for mine, plain in zip(
        torch.autograd.grad(found, (x, w), slope), torch.autograd.grad(wanted, (x, w), slope), strict=True
    ):
        assert mine.dtype == plain.dtype
        torch.testing.assert_close(mine, plain)


def test_nothing_is_kept_that_is_not_there_anyway():
    x, w = torch.randn(1, 50, 8).bfloat16().requires_grad_(), torch.randn(3, 8, requires_grad=True)
    there = {x.untyped_storage().data_ptr(), w.untyped_storage().data_ptr()}
    kept: list[Tensor] = []
    with saved_tensors_hooks(lambda one: (kept.append(one), one)[1], lambda one: one):
        token_logits(x, w)
    assert kept
    assert {one.untyped_storage().data_ptr() for one in kept} <= there


def test_states_that_need_no_gradient_get_none():
    x, w = torch.randn(1, 4, 8).bfloat16(), torch.randn(3, 8, requires_grad=True)
    token_logits(x, w).sum().backward()
    assert x.grad is None
    assert w.grad is not None
