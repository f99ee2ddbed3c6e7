"""The backends agree with the plain loop in the output and in every gradient; the loop agrees with the equation."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loramix.experts.apply import BACKENDS, choose, concat, loop, per_sequence
from loramix.routing import Routing
from tests.reference import mixture_delta


def _case(batch: int, length: int, sizes: tuple[int, int], experts: int, rank: int, k: int, level: str):
    inputs, outputs = sizes
    made = torch.Generator().manual_seed(batch * 100 + length * 10 + experts)
    draw = lambda *shape: torch.randn(*shape, generator=made, dtype=torch.float64, requires_grad=True)  # noqa: E731
    places = batch if level == "sequence" else batch * length
    ids = torch.stack([torch.randperm(experts, generator=made)[:k] for _ in range(places)])
    weights = torch.rand(places, k, generator=made, dtype=torch.float64, requires_grad=True)
    mask = torch.ones(places, dtype=torch.bool)
    routing = Routing(ids=ids, weights=weights, logits=None, level=level, mask=mask)
    tensors = [
        draw(batch, length, outputs),
        draw(batch, length, inputs),
        draw(experts, rank, inputs),
        draw(experts, outputs, rank),
    ]
    return tensors, routing


def _outcome(apply, tensors, routing):
    out = apply(*tensors, routing, 1.7)
    weighted = (out * torch.arange(out.numel(), dtype=out.dtype).view_as(out).cos()).sum()
    return [out, *torch.autograd.grad(weighted, [*tensors, routing.weights])]


@settings(max_examples=60, deadline=None)
@given(
    batch=st.integers(1, 4),
    length=st.integers(1, 5),
    sizes=st.tuples(st.integers(1, 7), st.integers(1, 7)),
    experts=st.integers(2, 5),
    rank=st.integers(1, 4),
    data=st.data(),
)
def test_backends_agree_with_loop(batch, length, sizes, experts, rank, data):
    k = data.draw(st.integers(1, experts))
    for level in ("sequence", "token"):
        tensors, routing = _case(batch, length, sizes, experts, rank, k, level)
        expected = _outcome(loop, tensors, routing)
        for name, apply in BACKENDS.items():
            if name == "per_sequence" and level == "token":
                continue
            for got, wanted in zip(_outcome(apply, tensors, routing), expected, strict=True):
                torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-10, msg=f"{name} {level}")


def test_loop_is_the_equation():
    tensors, routing = _case(2, 3, (5, 4), 3, 2, 2, "token")
    y_BTO, x_BTI, A_ERI, B_EOR = tensors
    out = loop(*tensors, routing, 1.7).reshape(6, 4)
    gates = routing.gates(3)
    for n, x_I in enumerate(x_BTI.reshape(6, 5)):
        wanted = y_BTO.reshape(6, 4)[n] + mixture_delta(x_I, A_ERI, B_EOR, gates[n], 1.7)
        torch.testing.assert_close(out[n], wanted)


def test_gradients_numerically():
    tensors, routing = _case(2, 2, (3, 3), 2, 2, 1, "sequence")
    for apply in BACKENDS.values():
        torch.autograd.gradcheck(lambda *t, apply=apply: apply(*t, routing, 0.5), tensors)


def test_an_idle_expert_has_a_zero_gradient_not_none():
    tensors, routing = _case(2, 3, (4, 4), 3, 2, 1, "sequence")
    routing = Routing(
        ids=torch.tensor([[0], [2]]), weights=routing.weights, logits=None, level="sequence", mask=routing.mask
    )
    for apply in BACKENDS.values():
        _, _, _, grad_A, grad_B, _ = _outcome(apply, tensors, routing)
        assert grad_A[1].eq(0).all(), apply.__name__
        assert grad_B[1].eq(0).all(), apply.__name__
        assert grad_A[0].abs().sum() > 0


def test_per_sequence_refuses_token_routing():
    tensors, routing = _case(2, 3, (4, 4), 3, 2, 1, "token")
    with pytest.raises(ValueError, match="one decision per sequence"):
        per_sequence(*tensors, routing, 1.0)


def test_auto_takes_per_sequence_only_for_several_experts_by_sequence():
    _, by_sequence = _case(2, 3, (4, 4), 3, 2, 1, "sequence")
    _, by_token = _case(2, 3, (4, 4), 3, 2, 1, "token")
    assert choose("auto", by_sequence, 3) is per_sequence
    assert choose("auto", by_sequence, 1) is concat
    assert choose("auto", by_token, 3) is concat
    assert choose("loop", by_token, 3) is loop
