"""Dropout on experts' inputs, on a shared matrix, on gates: with the mask known, the slow twin must agree."""

from __future__ import annotations

import pytest
import torch

from loramix.experts.dropping import InputDropout
from tests import method_cases as cases
from tests.method_cases import CASES
from tests.reference_methods import capacity
from tests.side_by_side import assert_same, change, outcome_of, outcome_of_twin, run, wanted


@pytest.mark.parametrize("backend", ["auto", "loop", "concat"])
@pytest.mark.parametrize(("name", "shared"), [("mosld", "A_ERI"), ("mosld-b", "B_EOR")])
def test_one_weight_mask_for_all_experts_and_tokens(name: str, shared: str, backend: str):
    """The entries without gradient are the mask; with this one mask the twin must agree in everything."""
    given = cases.batch()
    p = 0.3
    model = cases.build(name, dtype=torch.float64, bank={"weight_dropout": p}, backend=backend).train()
    got = outcome_of(model, given, CASES[name].losses)
    masks = {n: (g != 0).double() / (1 - p) for n, g in got.items() if n.endswith(shared)}
    dropped = torch.cat([mask.flatten() == 0 for mask in masks.values()]).double().mean()
    assert 0.2 < dropped < 0.4
    assert_same(got, outcome_of_twin(name, cases.twin(name, model, given, masks), given), rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("name", ["mosld", "mosld-b"])
def test_weight_dropout_is_drawn_anew_and_rests_at_evaluation(name: str):
    given = cases.batch()
    model = cases.build(name, dtype=torch.float64, bank={"weight_dropout": 0.3}).train()
    with torch.no_grad(), cases.all_in_double():
        first, second = run(model, given)[1], run(model, given)[1]
        at_rest = run(model.eval(), given)[1][given.mask.bool()]
    assert not torch.equal(first, second)
    torch.testing.assert_close(at_rest, wanted(name)["logits"], rtol=1e-9, atol=1e-10)


def test_mosl_is_mosld_without_dropout():
    with torch.no_grad():
        mosl, mosld = (run(cases.build(n, dtype=torch.float64).train(), cases.batch())[1] for n in ("mosl", "mosld"))
    assert torch.equal(mosl, mosld)


def test_gate_dropout_with_a_known_mask(monkeypatch):
    """Two gates of each token are left, so that the choice is without ties."""
    kept = torch.zeros(2, 6, 4).scatter(2, torch.rand(2, 6, 4).argsort(dim=2)[..., :2], 1.0).double()
    with monkeypatch.context() as patched:
        patched.setattr(
            torch.nn.functional, "dropout", lambda x, p, training: x * kept.view_as(x) / (1 - p) if training else x
        )
        model = cases.build(
            "sira",
            dtype=torch.float64,
            target_modules=["q_proj"],
            router={"gate_dropout": 0.4, "capacity_factor": 0.75},
        )
        got = outcome_of(model.train(), cases.batch(), CASES["sira"].losses)

    def router(w, given):
        return capacity(w["w_EI"], 2, given.mask, factor=0.75, kept_BTE=kept, drop=0.4)

    change(monkeypatch, "sira", router=router, routed=("q_proj",))
    given = cases.batch()
    twin = cases.twin("sira", model, given)
    assert_same(got, outcome_of_twin("sira", twin, given), rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("backend", ["auto", "loop", "concat"])
@pytest.mark.parametrize("name", ["lora", "moe-lora", "hydralora", "mole", "moelora-task", "lorahub"])
def test_one_input_mask_for_all_experts_and_none_for_the_router(monkeypatch, name: str, backend: str):
    """Both layers' query projections drop the same inputs; the frozen part and the router see them all."""
    given, p = cases.batch(), 0.3
    keep = torch.rand(2, 6, 8) >= p
    left = keep.double() / (1 - InputDropout(p).p)
    target = {"target_modules": ["q_proj"], "lora_dropout": p, "backend": backend}
    model = cases.build(name, dtype=torch.float64, **target).train()
    with monkeypatch.context() as patched:
        patched.setattr(InputDropout, "draw", lambda *_: keep)
        got = outcome_of(model, given, CASES[name].losses)
    change(monkeypatch, name, routed=("q_proj",))
    twin = cases.twin(name, model, given)
    for layer in twin.model.model.layers:
        layer.self_attn.q_proj.left_BTI = left
    assert_same(got, outcome_of_twin(name, twin, given), rtol=1e-9, atol=1e-10)
