"""The sequence router and the decisions, by hand values."""

from __future__ import annotations

import pytest
import torch

from loramix import ConfigError, LoramixConfig
from loramix.losses import layer_correct, routing_cross_entropy
from loramix.routers import SequenceRouterConfig, Site
from loramix.routing import Call, Routing, last_true
from loramix.tuner.decisions import decision_problem, last_scope_needed, settle


def _routing(logits: list[list[float]], mask: list[bool] | None = None) -> Routing:
    tensor = torch.tensor(logits)
    return Routing(
        ids=tensor.argmax(1, keepdim=True),
        weights=torch.ones(len(logits), 1),
        logits=tensor,
        level="sequence",
        mask=torch.tensor(mask or [True] * len(logits)),
    )


def test_last_true_for_left_and_right_padding():
    mask = torch.tensor([[0, 1, 1, 0], [1, 1, 1, 1], [1, 0, 0, 0], [0, 0, 0, 0]]).bool()
    assert last_true(mask).tolist() == [2, 3, 0, 0]


def test_pooling_reads_prompt_positions_only():
    x = torch.arange(24.0).reshape(2, 4, 3)
    prompt = torch.tensor([[1, 1, 0, 0], [0, 1, 1, 1]]).bool()
    last = SequenceRouterConfig(pooling="last").build(Site(3, 3, 2)).pool(x, prompt)
    mean = SequenceRouterConfig(pooling="mean").build(Site(3, 3, 2)).pool(x, prompt)
    assert torch.equal(last, torch.stack([x[0, 1], x[1, 3]]))
    torch.testing.assert_close(mean, torch.stack([x[0, :2].mean(0), x[1, 1:].mean(0)]))


def test_router_works_in_fp32_whatever_the_model_is():
    router = SequenceRouterConfig(reads="experts").build(Site(3, 3, 2)).to(torch.bfloat16)
    mask = torch.ones(2, 4, dtype=torch.bool)
    routing = router(torch.randn(2, 4, 3).bfloat16(), Call(mask, mask), "layers.0", lambda: None)
    assert routing.logits.dtype == torch.float32


def test_label_is_followed_and_the_own_choice_without_it():
    router = SequenceRouterConfig(reads="experts").build(Site(3, 3, 4))
    mask = torch.ones(5, 2, dtype=torch.bool)
    x = torch.randn(5, 2, 3)
    free = router(x, Call(mask, mask), "layers.0", lambda: None)
    assert torch.equal(free.ids[:, 0], free.logits.argmax(1))
    told = router(x, Call(mask, mask, expert_ids_B=torch.tensor([3, 3, 0, 1, 2])), "layers.0", lambda: None)
    assert told.ids[:, 0].tolist() == [3, 3, 0, 1, 2]
    assert torch.equal(told.logits, free.logits)


def test_decisions_by_hand():
    routings = {
        "layers.0": _routing([[9.0, 0.0, 0.0]]),
        "layers.1": _routing([[9.0, 0.0, 0.0]]),
        "layers.2": _routing([[0.0, 0.0, 1.0]]),
    }
    assert settle(routings, "last")[0].item() == 2
    assert settle(routings, "vote")[0].item() == 0
    assert settle(routings, "layer:1")[0].item() == 0
    torch.testing.assert_close(settle(routings, "vote")[1], torch.tensor([[2 / 3, 0.0, 1 / 3]]))
    torch.testing.assert_close(settle(routings, "last")[1], torch.tensor([[0.0, 0.0, 1.0]]).softmax(1))


def test_votes_that_tie_go_to_the_surer_routers():
    timid, sure = _routing([[1.0, 0.9]]), _routing([[0.0, 5.0]])
    assert settle({"layers.0": timid, "layers.1": sure}, "vote")[0].item() == 1
    many_timid = {f"layers.{i}": timid for i in range(3)} | {"layers.3": sure}
    assert settle(many_timid, "vote")[0].item() == 0, "a tie-break must never overrule a majority"


def test_decision_words():
    assert decision_problem("last") is None
    assert decision_problem("layer:12") is None
    for wrong in ("layer:", "layer:x", "first", ""):
        assert "expected one of" in decision_problem(wrong)
    with pytest.raises(ConfigError, match="no router in layer 7"):
        last_scope_needed("layer:7", ["layers.0", "layers.1"])


def test_routing_loss_is_the_mean_over_layers_and_skips_rows_without_prompt():
    routings = {
        "layers.0": _routing([[2.0, 0.0], [0.0, 0.0]], [True, False]),
        "layers.1": _routing([[0.0, 0.0]] * 2, [True, False]),
    }
    labels = torch.tensor([0, 1])
    losses = routing_cross_entropy(routings, labels)
    first = -torch.log_softmax(torch.tensor([2.0, 0.0]), 0)[0]
    torch.testing.assert_close(losses, torch.stack([(first + torch.log(torch.tensor(2.0))) / 2, torch.tensor(0.0)]))
    assert layer_correct(routings, labels).tolist() == [[True, False], [True, False]]


def test_wrong_settings_are_named_together():
    with pytest.raises(ConfigError) as caught:
        LoramixConfig(
            experts=["a", "a"], r=0, lora_dropout=1.5, router={"poling": "mean", "pooling": "max"}, decision="first"
        )
    message = str(caught.value)
    for part in ("r = 0", "lora_dropout", "a given more than once", 'Did you mean "pooling"', "'max'", "'first'"):
        assert part in message
    assert message.startswith("6 problems")


def test_methods_refuse_what_they_cannot_use():
    with pytest.raises(ConfigError, match="at least two domains"):
        LoramixConfig(method="moa", experts=["one"])
    with pytest.raises(ConfigError, match="has one expert"):
        LoramixConfig(method="lora", experts=["a", "b"])
    with pytest.raises(ConfigError, match="lora routes nothing"):
        LoramixConfig(method="lora", router={"pooling": "mean"})
    with pytest.raises(ConfigError, match="Did you mean"):
        LoramixConfig(method="mao", experts=["a", "b"])
