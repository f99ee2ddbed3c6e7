"""Every method on a tiny Llama against its slow twin: logits, losses, and the gradients of every trained parameter."""

from __future__ import annotations

import pytest
import torch

from loramix.methods import METHODS
from tests import method_cases as cases
from tests.method_cases import CASES
from tests.reference_methods import capacity, main_directions, prototype, top_k
from tests.side_by_side import assert_same, change, compare, ours, run, wanted


def test_every_method_but_moa_has_its_case():
    others = {"moa", "full", "prefix"}
    assert set(CASES) == set(METHODS) - others


@pytest.mark.parametrize("backend", ["auto", "loop", "concat"])
@pytest.mark.parametrize("name", CASES)
def test_against_the_slow_twin(name: str, backend: str):
    got = ours(name, backend=backend)
    assert_same(got, wanted(name), rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("name", cases.TOKEN_ROUTED)
def test_grouped_against_the_slow_twin(name: str):
    got = ours(name, torch.float32, backend="grouped")
    assert_same(got, wanted(name), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", ["lorahub", "moelora-task", "lora"])
def test_per_sequence_against_the_slow_twin(name: str):
    got = ours(name, backend="per_sequence")
    assert_same(got, wanted(name), rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("name", CASES)
def test_evaluation_is_training_without_dropout(name: str):
    given = cases.batch()
    unlimited = {"router": {"gate_dropout": 0.0, "eval_capacity_factor": 0.75}} if name == "sira" else {}
    model = cases.build(name, dtype=torch.float64, **unlimited).eval()
    with torch.no_grad(), cases.all_in_double():
        _, logits = run(model, given, domain_ids=torch.tensor(given.domains))
    torch.testing.assert_close(logits[given.mask.bool()], wanted(name)["logits"], rtol=1e-9, atol=1e-10)


# ---- choices that are not the default -----------------------------------------------------------------------------


FEW = ("q_proj", "down_proj")
"""Targets for choices that are the same wherever they are made."""


@pytest.mark.parametrize("k", [1, 2, 3])
@pytest.mark.parametrize("weighting", ["renormalised", "probability", "one"])
def test_weightings(monkeypatch, weighting: str, k: int):
    change(monkeypatch, "moe-lora", router=lambda w, _: top_k(w["w_EI"], k, weighting), routed=FEW)
    compare("moe-lora", router={"top_k": k, "weighting": weighting}, target_modules=[*FEW])


@pytest.mark.parametrize(
    ("name", "scope"),
    [
        ("moe-lora", "block"),
        ("moe-lora", "layer"),
        ("moe-lora", "model"),
        ("mole", "module"),
        ("mole", "block"),
        ("llava-mole", "module"),
        ("moelora-task", "layer"),
    ],
)
def test_scopes(monkeypatch, name: str, scope: str):
    change(monkeypatch, name, scope=scope)
    compare(name, scope=scope)


@pytest.mark.parametrize("renormalised", [True, False])
@pytest.mark.parametrize("factor", [0.3, 1.0, 1.25])
def test_capacities(monkeypatch, factor: float, renormalised: bool):
    def router(w, given):
        return capacity(w["w_EI"], 2, given.mask, factor=factor, renormalised=renormalised)

    change(monkeypatch, "sira", router=router, routed=FEW)
    settings = {"gate_dropout": 0.0, "capacity_factor": factor, "renormalised": renormalised}
    compare("sira", router=settings, target_modules=[*FEW])


@pytest.mark.parametrize("temperature", [0.2, 5.0])
def test_arrow_temperature(monkeypatch, temperature: float):
    change(monkeypatch, "arrow", router=lambda w, _: prototype(w["main"], 2, temperature), routed=FEW)
    compare("arrow", router={"temperature": temperature}, target_modules=[*FEW])


def test_arrow_prototypes_are_main_directions_up_to_their_sign():
    for module in cases.build("arrow").modules():
        if hasattr(module, "loramix_router") and "default" in module.loramix_router:
            bank, found = module.bank("default"), module.router("default").prototypes_EI.double()
            exact = main_directions(bank.A_ERI.detach().double(), bank.B_EOR.detach().double())
            torch.testing.assert_close((found * exact).sum(dim=1).abs(), torch.ones(3).double(), rtol=1e-6, atol=1e-6)


def test_sira_drops_nothing_at_evaluation_by_default(monkeypatch):
    given = cases.batch()
    change(monkeypatch, "sira", router=lambda w, given: capacity(w["w_EI"], 2, given.mask, factor=None))
    model = cases.build("sira", dtype=torch.float64).eval()
    twin = cases.twin("sira", model, given)
    with torch.no_grad(), cases.all_in_double():
        logits, slow = run(model, given)[1], run(twin.model, given)[1]
    torch.testing.assert_close(logits[given.mask.bool()], slow[given.mask.bool()], rtol=1e-9, atol=1e-10)
