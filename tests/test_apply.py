"""The backends agree with the plain loop in the output and in every gradient; the loop agrees with the equation."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import loramix.experts.apply as apply_module
from loramix.experts.apply import BACKENDS, choose, concat, gates_by_token, loop, per_sequence
from loramix.experts.by_channel import ByChannel
from loramix.experts.dropping import InputDropout
from loramix.experts.faster import Shape
from loramix.experts.fused import Layer, can_fuse, fused
from loramix.experts.grouped import fits, grouped
from loramix.routing import Routing
from loramix.segments import Segments
from tests.reference import mixture_delta

SHARES = ("nothing", "down", "up")


def _case(batch, length, sizes, experts, rank, k, level, share="nothing", dtype=torch.float64):
    """y, x, A, B and a routing with K of E experts each (all of them, unsorted ids left out, where k is None)."""
    inputs, outputs = sizes
    made = torch.Generator().manual_seed(batch * 100 + length * 10 + experts)
    draw = lambda *shape: torch.randn(*shape, generator=made, dtype=dtype, requires_grad=True)  # noqa: E731
    places = batch if level == "sequence" else batch * length
    ids = None
    if k is not None:
        ids = torch.stack([torch.randperm(experts, generator=made)[:k] for _ in range(places)])
    weights = torch.rand(places, k or experts, generator=made, dtype=dtype, requires_grad=True)
    mask = torch.ones(places, dtype=torch.bool)
    routing = Routing(ids=ids, weights=weights, logits=None, level=level, mask=mask)
    tensors = [
        draw(batch, length, outputs),
        draw(batch, length, inputs),
        draw(1 if share == "down" else experts, rank, inputs),
        draw(1 if share == "up" else experts, outputs, rank),
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
    share=st.sampled_from(SHARES),
    data=st.data(),
)
def test_backends_agree_with_loop(batch, length, sizes, experts, rank, share, data):
    k = data.draw(st.one_of(st.none(), st.integers(1, experts)))
    for level in ("sequence", "token"):
        tensors, routing = _case(batch, length, sizes, experts, rank, k, level, share)
        expected = _outcome(loop, tensors, routing)
        for name in ("concat", "per_sequence") if level == "sequence" else ("concat",):
            for got, wanted in zip(_outcome(BACKENDS[name], tensors, routing), expected, strict=True):
                torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-10, msg=f"{name} {level} {share}")


@pytest.mark.parametrize("faster", ["concat", "grouped"])
def test_auto_takes_what_was_measured_to_be_faster(monkeypatch: pytest.MonkeyPatch, faster: str):
    monkeypatch.setattr(apply_module, "fastest", lambda shape, among: faster)
    tensors, routing = _case(2, 3, (8, 8), 64, 8, 2, "token", dtype=torch.float32)
    assert choose("auto", routing, *tensors[2:]) == faster


@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("k", [1, 2, 5, None])
def test_grouped_agrees_with_loop(share, k):
    tensors, routing = _case(3, 7, (12, 8), 5, 4, k, "token", share, torch.float32)
    expected = _outcome(loop, tensors, routing)
    for got, wanted in zip(_outcome(grouped, tensors, routing), expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)


def _at_once(layer, x, keep, A, B, gates, scaling):
    (out,) = fused([Layer(A, B, gates, scaling, layer)], x.flatten(0, 1), keep, ByChannel())
    return out.view(*x.shape[:-1], out.shape[-1])


def _agree(one, other, given, **near):
    """Two ways give the same tensors and the same gradients."""
    got, wanted = one(*given), other(*given)
    torch.testing.assert_close(got, wanted, **near)
    swing = [torch.arange(y.numel(), dtype=y.dtype).view_as(y).cos() for y in wanted]
    slopes = [
        torch.autograd.grad(sum((y * s).sum() for y, s in zip(ys, swing, strict=True)), given) for ys in (got, wanted)
    ]
    for left, right in zip(*slopes, strict=True):
        torch.testing.assert_close(left, right, **near)


@pytest.mark.parametrize("share", SHARES)
def test_grouped_under_autocast_is_in_its_type(share):
    tensors, routing = _case(3, 7, (16, 8), 5, 8, 2, "token", share, torch.float32)
    expected = _outcome(loop, tensors, routing)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = _outcome(grouped, tensors, routing)
    for got, wanted in zip(found, expected, strict=True):
        assert got.dtype == torch.float32, "what was given in fp32 comes back so"
        torch.testing.assert_close(got, wanted, rtol=0, atol=3e-2 * wanted.abs().max().item())
    assert not torch.equal(found[0], expected[0]), "it was in 16 bits"


@pytest.mark.parametrize("rows", ["in autocast", "in fp32"])
def test_rows_of_narrow_experts_go_by_channel_in_autocast(rows):
    """In 16 bits many small products cost more than all experts' channels for every token."""
    mask, segments = torch.ones(2, dtype=torch.bool), Segments.between(torch.tensor([0, 3, 8]), 8)
    routing = Routing(torch.tensor([[1], [0]]), torch.ones(2, 1), None, "sequence", mask, segments=segments)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=rows == "in autocast"):
        assert choose("auto", routing, torch.empty(8, 8, 16), torch.empty(8, 16, 8)) == (
            "concat" if rows == "in autocast" else "per_sequence"
        )
        assert choose("auto", routing, torch.empty(16, 8, 16), torch.empty(16, 16, 8)) == "per_sequence"


@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dropped", [True, False])
def test_fused_agrees_with_the_layer_and_the_loop(share, bias, dropped):
    (_, x, A, B), routing = _case(2, 5, (6, 4), 3, 2, 2, "token", share)
    layer = nn.Linear(6, 4, bias=bias, dtype=torch.float64).requires_grad_(False)
    keep = torch.rand(x.shape) < 0.7 if dropped else None
    kept = 1.0 if keep is None else keep.double()
    _agree(
        lambda x, A, B, _: [
            _at_once(layer, x, None if keep is None else keep.flatten(0, 1), A, B, gates_by_token(x, routing, 3), 1.7)
        ],
        lambda x, A, B, _: [loop(layer(x), x * kept, A, B, routing, 1.7)],
        (x, A, B, routing.weights),
    )


@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("dropped", [True, False])
def test_layers_that_read_the_same_agree_with_each_alone(share, dropped):
    """Two layers of other widths, ranks, gates and scalings, of which one is used twice as much as the other."""
    (_, x, A, B), routing = _case(2, 5, (6, 4), 3, 2, 2, "token", share)
    (_, _, C, D), other = _case(2, 5, (6, 7), 3, 4, 2, "token", share)
    layers = [nn.Linear(6, 4, dtype=torch.float64), nn.Linear(6, 7, bias=False, dtype=torch.float64)]
    for layer in layers:
        layer.requires_grad_(False)
    keep = torch.rand(x.shape) < 0.7 if dropped else None
    kept = 1.0 if keep is None else keep.double()

    def together(x, A, B, C, D, *_):
        gates = [gates_by_token(x, one, 3) for one in (routing, other)]
        of_layers = [Layer(A, B, gates[0], 1.7, layers[0]), Layer(C, D, gates[1], 0.6, layers[1])]
        outs = fused(of_layers, x.flatten(0, 1), None if keep is None else keep.flatten(0, 1), ByChannel())
        return [out.view(2, 5, -1) for out in outs]

    def alone(x, A, B, C, D, *_):
        return [
            loop(layers[0](x), x * kept, A, B, routing, 1.7),
            loop(layers[1](x), x * kept, C, D, other, 0.6),
        ]

    _agree(together, alone, (x, A, B, C, D, routing.weights, other.weights))


def test_fused_without_gates_is_lora():
    (_, x, A, B), _ = _case(2, 5, (6, 4), 1, 2, 1, "sequence")
    layer = nn.Linear(6, 4, dtype=torch.float64).requires_grad_(False)
    torch.testing.assert_close(_at_once(layer, x, None, A, B, None, 0.5), layer(x) + 0.5 * (x @ A[0].T) @ B[0].T)
    torch.autograd.gradcheck(partial(lambda x, A, B: _at_once(layer, x, None, A, B, None, 0.5)), (x, A, B))


@pytest.mark.parametrize("kinds", ["autocast", "autocast, base in bf16", "base in bf16"])
@pytest.mark.parametrize("share", SHARES)
def test_fused_in_sixteen_bits_agrees_with_plain_backends(share, kinds):
    """As near as sums of bf16 come, and with the types that the plain way gives; gradients of experts stay fp32."""
    (_, x, A, B), routing = _case(2, 5, (16, 12), 3, 4, 2, "token", share, torch.float32)
    layer = nn.Linear(16, 12).requires_grad_(False)
    if "base" in kinds:
        layer, x = layer.bfloat16(), x.detach().bfloat16().requires_grad_()
    given = (x, A, B, routing.weights)
    found = []
    for way in ("fused", "plain"):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled="autocast" in kinds):
            assert can_fuse(layer, x, A)
            if way == "fused":
                y = _at_once(layer, x, None, A, B, gates_by_token(x, routing, 3, A.dtype), 1.7)
            else:
                wide = x.to(A.dtype)
                y = concat(layer(x).to(wide.dtype), wide, A, B, routing, 1.7).bfloat16()
        slope = torch.arange(y.numel()).view_as(y).float().cos()
        found.append((y, *torch.autograd.grad((y.float() * slope).sum(), given)))
    for got, wanted in zip(*found, strict=True):
        assert got.dtype == wanted.dtype
        torch.testing.assert_close(got.float(), wanted.float(), rtol=0, atol=2e-2 * wanted.abs().max().item())


def test_input_dropout_drops_its_share_and_rests_outside_training():
    torch.manual_seed(0)
    dropout, x = InputDropout(0.05), torch.ones(400, 999)  # not a multiple of four numbers
    keep = dropout.draw(x)
    assert keep.shape == x.shape
    assert float(keep.double().mean()) == pytest.approx(0.95, abs=4 * (0.05 * 0.95 / x.numel()) ** 0.5)
    for way in (0, 1):  # neither rows nor columns are dropped alike
        assert float(keep.double().mean(dim=way).min()) > 0.75
    assert not torch.equal(keep, dropout.draw(x)), "drawn anew"
    torch.manual_seed(1)
    first = dropout(x)
    torch.manual_seed(1)
    assert torch.equal(dropout(x), first)
    assert float(first.mean()) == pytest.approx(1.0, abs=2e-3)
    assert set(first.unique().tolist()) == {0.0, float(torch.tensor(dropout.factor))}
    assert dropout.eval().draw(x) is None
    assert dropout(x) is x
    assert InputDropout(0.0).draw(x) is None
    assert 0 < InputDropout(0.999999).p < 1, "something is left"


def test_fused_is_for_plain_frozen_layers_only():
    x, A = torch.randn(2, 3, 4), torch.randn(2, 2, 4)
    layer = nn.Linear(4, 4).requires_grad_(False)
    assert can_fuse(layer, x, A)
    assert not can_fuse(nn.Linear(4, 4), x, A), "trained itself"
    assert not can_fuse(nn.Sequential(layer), x, A)
    assert not can_fuse(layer, x.double(), A)
    with torch.no_grad():
        assert not can_fuse(layer, x, A)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert can_fuse(layer, x, A)
        assert not can_fuse(layer.double(), x.double(), A), "autocast leaves doubles alone"
    layer.float()
    layer.forward = layer.forward
    assert not can_fuse(layer, x, A), "somebody's own forward, as accelerate puts it on to load weights"
    del layer.forward
    assert can_fuse(layer, x, A)
    layer.register_forward_hook(lambda *_: None)
    assert not can_fuse(layer, x, A)


@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("trained", ["A", "B", "gates", "x"])
def test_fused_works_out_the_gradients_that_are_wanted(share, trained):
    """Routers of frozen experts (MoLE), experts above a frozen prefix."""
    (_, x, A, B), routing = _case(2, 5, (6, 4), 3, 2, 2, "token", share)
    layer = nn.Linear(6, 4, dtype=torch.float64).requires_grad_(False)
    given = {"x": x, "A": A, "B": B, "gates": gates_by_token(x, routing, 3).detach().requires_grad_()}
    everything = _at_once(layer, given["x"], None, given["A"], given["B"], given["gates"], 1.7)
    (wanted,) = torch.autograd.grad(everything.sum(), [given[trained]])
    told = {name: one if name == trained else one.detach() for name, one in given.items()}
    y = _at_once(layer, told["x"], None, told["A"], told["B"], told["gates"], 1.7)
    (got,) = torch.autograd.grad(y.sum(), [told[trained]])
    torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("share", SHARES)
def test_fused_takes_no_tokens(share):
    (_, x, A, B), _ = _case(2, 5, (6, 4), 3, 2, 2, "token", share)
    layer = nn.Linear(6, 4, dtype=torch.float64).requires_grad_(False)
    y = _at_once(layer, x[:, :0], None, A, B, x.new_zeros(0, 3).requires_grad_(), 1.7)
    assert y.numel() == 0
    y.sum().backward()
    assert not A.grad.any()
    assert not B.grad.any()


@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("k", [2, None])
def test_loop_is_the_equation(share, k):
    tensors, routing = _case(2, 3, (5, 4), 3, 2, k, "token", share)
    y_BTO, x_BTI, A_ERI, B_EOR = tensors
    out = loop(*tensors, routing, 1.7).reshape(6, 4)
    gates = routing.gates(3)
    for n, x_I in enumerate(x_BTI.reshape(6, 5)):
        delta = mixture_delta(x_I, A_ERI.expand(3, -1, -1), B_EOR.expand(3, -1, -1), gates[n], 1.7)
        torch.testing.assert_close(out[n], y_BTO.reshape(6, 4)[n] + delta)


@pytest.mark.parametrize("share", SHARES)
def test_gradients_numerically(share):
    tensors, routing = _case(2, 2, (3, 3), 2, 2, 1, "sequence", share)
    for name in ("loop", "concat", "per_sequence"):
        torch.autograd.gradcheck(partial(_routed, BACKENDS[name], routing), tensors)


def _routed(apply, routing, *tensors):
    return apply(*tensors, routing, 0.5)


@pytest.mark.parametrize("name", ["loop", "concat", "grouped"])
def test_an_idle_expert_has_a_zero_gradient_not_none(name):
    tensors, routing = _case(2, 3, (4, 4), 3, 4, 1, "token", dtype=torch.float32)
    idle = Routing(torch.tensor([[0], [2]] * 3), routing.weights, None, "token", routing.mask)
    _, _, _, grad_A, grad_B, _ = _outcome(BACKENDS[name], tensors, idle)
    assert grad_A[1].eq(0).all()
    assert grad_B[1].eq(0).all()
    assert grad_A[0].abs().sum() > 0


@pytest.mark.parametrize("name", ["loop", "concat", "grouped"])
@pytest.mark.parametrize("share", SHARES)
def test_permuting_experts_changes_nothing(name, share):
    tensors, routing = _case(2, 6, (8, 8), 4, 4, 2, "token", share, torch.float32)
    order = torch.tensor([2, 0, 3, 1])
    moved = [tensors[0], tensors[1], *(t if t.shape[0] == 1 else t[order] for t in tensors[2:])]
    renamed = Routing(order.argsort()[routing.ids], routing.weights, None, "token", routing.mask)
    torch.testing.assert_close(BACKENDS[name](*moved, renamed, 1.7), BACKENDS[name](*tensors, routing, 1.7))


def test_per_sequence_refuses_token_routing():
    tensors, routing = _case(2, 3, (4, 4), 3, 2, 1, "token")
    with pytest.raises(ValueError, match="one decision per sequence"):
        per_sequence(*tensors, routing, 1.0)


def test_auto_chooses_by_width_and_sparsity(monkeypatch: pytest.MonkeyPatch):
    measured: list[Shape] = []
    monkeypatch.setattr(apply_module, "fastest", lambda shape, among: measured.append(shape))

    def chosen(level, experts, rank, k, sizes=(8, 8), dtype=torch.float32):
        tensors, routing = _case(2, 3, sizes, experts, rank, k, level, dtype=dtype)
        return choose("auto", routing, *tensors[2:])

    assert chosen("sequence", 3, 2, 1) == "per_sequence"
    assert chosen("sequence", 1, 2, 1) == "concat"
    assert chosen("sequence", 3, 2, None) == "concat", "all experts of a sequence are one wide LoRA"
    assert chosen("token", 8, 8, 2) == "concat"
    assert chosen("token", 64, 8, 2) == "grouped"
    assert [shape.chosen for shape in measured] == [2], "narrow ones are not measured"
    assert chosen("token", 1024, 8, 2) == "grouped"
    assert len(measured) == 1, "nor are very wide ones"
    assert chosen("token", 64, 8, None) == "concat", "with all experts there is nothing to sort"
    assert chosen("token", 64, 6, 2) == "concat", "grouped_mm takes no such rank"
    assert chosen("token", 64, 8, 2, sizes=(7, 8)) == "concat"
    assert chosen("token", 64, 8, 2, dtype=torch.float64) == "concat"
    assert choose("loop", _case(1, 1, (4, 4), 3, 2, 1, "token")[1], torch.ones(3, 2, 4), torch.ones(3, 4, 2)) == "loop"


def test_grouped_knows_its_limits():
    assert fits(4, 8, 8, torch.float32)
    assert not fits(4, 8, 8, torch.bfloat16)
    assert fits(8, 8, 16, torch.bfloat16)
    assert not fits(8, 8, 8, torch.float64)


def test_concat_compiles_as_one_graph():
    """No data-dependent shape, no host synchronisation: torch.compile with fullgraph refuses both."""
    tensors, routing = _case(2, 3, (4, 4), 3, 2, 2, "token", dtype=torch.float32)

    @partial(torch.compile, fullgraph=True, backend="aot_eager")
    def compiled(y, x, A, B, ids, weights, mask):
        return concat(y, x, A, B, Routing(ids, weights, None, "token", mask), 1.7)

    got = compiled(*tensors, routing.ids, routing.weights, routing.mask)
    torch.testing.assert_close(got, concat(*tensors, routing, 1.7))
