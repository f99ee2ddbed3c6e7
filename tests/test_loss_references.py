"""Losses on values made up, against the slow ones and against what is known of their extremes."""

from __future__ import annotations

import math

import pytest
import torch

from loramix.losses import contrastive, gate_balance, load_balance, localized_balance, localized_balance_cv, router_z
from loramix.routing import ExpertOutputs, Routing
from loramix.training.gradient_free import few_shot_objective
from tests import reference_losses


def _routing(ids: torch.Tensor | None, probabilities: torch.Tensor) -> Routing:
    places = len(probabilities)
    weights = torch.ones(places, 1) if ids is not None else probabilities
    return Routing(ids, weights, probabilities.log(), "token", torch.ones(places).bool(), probabilities)


@pytest.mark.parametrize("temperature", [0.1, 1.0])
def test_contrastive_loss_with_lonely_and_padded_outputs(temperature: float):
    ids = torch.tensor([0, 1, 0, 2, 1, 1, 0])
    mask = torch.tensor([1, 1, 1, 1, 1, 0, 1]).bool()
    outputs = torch.randn(7, 5, requires_grad=True)
    again = outputs.detach().double().requires_grad_()
    got = contrastive([ExpertOutputs(ids, outputs, mask)], temperature)
    real = [(int(e), o) for e, o, m in zip(ids, again, mask, strict=True) if m]
    wanted = reference_losses.info_nce(real, temperature)
    torch.testing.assert_close(got.double(), wanted, rtol=1e-5, atol=1e-6)
    got.backward()
    wanted.backward()
    torch.testing.assert_close(outputs.grad.double(), again.grad, rtol=1e-4, atol=1e-6)


def test_contrastive_loss_of_outputs_that_are_all_zero_is_finite():
    outputs = torch.zeros(4, 5, requires_grad=True)
    loss = contrastive([ExpertOutputs(torch.tensor([0, 0, 1, 1]), outputs, torch.ones(4).bool())])
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(outputs.grad).all()


def test_few_shot_objective():
    weights = [0.5, -1.5, 0.0]
    wanted = reference_losses.few_shot([1.0, 3.0], weights)
    assert few_shot_objective(2.0, torch.tensor(weights), 0.05) == pytest.approx(wanted)


def test_even_load_is_one_and_all_on_one_expert_is_their_number():
    def loss(ids, probabilities):
        places = len(ids)
        return load_balance(
            [Routing(ids, torch.ones(places, 1), None, "token", torch.ones(places).bool(), probabilities)]
        )

    even = loss(torch.arange(4)[:, None], torch.full((4, 4), 0.25))
    one = loss(torch.zeros(4, 1, dtype=torch.int64), torch.eye(4)[[0, 0, 0, 0]])
    assert float(even) == pytest.approx(1.0)
    assert float(one) == pytest.approx(4.0)


def test_gates_that_are_even_over_all_routers_have_the_least_balance_loss():
    """Two routers, each with a favourite of its own: MoLE's loss looks at both together."""
    one, other = torch.tensor([[0.9, 0.1]]), torch.tensor([[0.1, 0.9]])
    assert float(gate_balance([_routing(None, one), _routing(None, other)])) == pytest.approx(2 * math.log(2))
    assert float(gate_balance([_routing(None, one)])) == pytest.approx(-math.log(0.9) - math.log(0.1))


def test_z_loss_is_zero_for_normalised_scores():
    assert float(router_z([_routing(None, torch.tensor([[0.2, 0.8]]))])) == pytest.approx(0.0, abs=1e-12)


def test_localized_balance_is_zero_where_the_pushed_loads_are_equal():
    """In the paper's form that is where the half of a row's own kind has less: (1 + delta) q = (1 - delta) q'; in the
    form of the authors' code where it has more."""
    own_has_less = torch.tensor([[0.45, 0.55], [0.55, 0.45]])
    kinds = torch.tensor([0, 1])
    for loss, equal in ((localized_balance, own_has_less), (localized_balance_cv, own_has_less.flip(1))):
        assert float(loss([_routing(None, equal)], kinds)) == pytest.approx(0.0, abs=1e-9)
        even, other_way = (float(loss([_routing(None, p)], kinds)) for p in (torch.full((2, 2), 0.5), equal.flip(1)))
        assert 0 < even < other_way


def test_localized_balance_by_hand():
    """Two experts, two rows of one token: Z = (0.55, 0.45; 0.45, 0.55), mean 0.5, variance 0.0025 (unbiased a third
    more)."""
    even, kinds = _routing(None, torch.full((2, 2), 0.5)), torch.tensor([0, 1])
    assert float(localized_balance([even], kinds)) == pytest.approx(0.0025 / 0.5)
    assert float(localized_balance_cv([even], kinds)) == pytest.approx(0.0025 * 4 / 3 / 0.25)
