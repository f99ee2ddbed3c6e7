"""Activation checkpointing changes memory, not numbers; the reentrant form is refused."""

from __future__ import annotations

import pytest
import torch

from loramix import ConfigError
from loramix.losses import routing_cross_entropy
from tests import tiny


def _gradients(model, *, forwards: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Loss and gradients of some forwards, with different labels, before one backward."""
    total = torch.zeros(())
    for turn in range(forwards):
        ids = tiny.ids(3, 8) if turn == 0 else tiny.ids(3, 8).flip(0)
        labels = torch.tensor([turn, (turn + 1) % 3, 2])
        out = model(input_ids=ids, labels=tiny.labels(ids), domain_ids=labels)
        total = total + out.loss + 0.5 * routing_cross_entropy(model.routings, labels).sum()
    total.backward()
    return total.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("reads", ["base", "experts"])
@pytest.mark.parametrize("forwards", [1, 2])
@pytest.mark.parametrize("when", ["after", "before"])
def test_on_and_off_are_equal(reads, forwards, when):
    plain = tiny.moa(router={"reads": reads}).train()
    wanted_loss, wanted = _gradients(plain, forwards=forwards)
    base = tiny.llama()
    if when == "before":
        base.activation_checkpointing_enable()
    model = tiny.moa(base, router={"reads": reads}).train()
    if when == "after":
        model.get_base_model().activation_checkpointing_enable()
    loss, got = _gradients(model, forwards=forwards)
    assert torch.equal(loss, wanted_loss)
    assert got.keys() == wanted.keys()
    assert any("router" in name for name in got)
    for name, gradient in got.items():
        assert torch.equal(gradient, wanted[name]), name


def test_layers_really_run_twice():
    model = tiny.moa().train()
    model.get_base_model().activation_checkpointing_enable()
    ran = []
    model.get_base_model().model.layers[0].mlp.gate_proj.register_forward_hook(lambda *_: ran.append(1))
    ids, labels = tiny.ids(), torch.tensor([0, 1, 2])
    out = model(input_ids=ids, labels=tiny.labels(ids), domain_ids=labels)
    before = len(ran)
    out.loss.backward()
    assert len(ran) == before + 1
    assert len(model.routings) == 3, "the recomputation must not add or change records"


def test_reentrant_is_refused_before_and_after():
    model = tiny.moa()
    with pytest.raises(ConfigError, match="use_reentrant"):
        model.get_base_model().activation_checkpointing_enable({"use_reentrant": True})
    base = tiny.llama()
    base.activation_checkpointing_enable({"use_reentrant": True})
    with pytest.raises(ConfigError, match="use_reentrant"):
        tiny.moa(base)


def test_users_own_context_fn_is_kept():
    entered = []

    class Noted:
        def __init__(self, word: str) -> None:
            self.word = word

        def __enter__(self) -> None:
            entered.append(self.word)

        def __exit__(self, *_: object) -> None:
            return None

    model = tiny.moa().train()
    model.get_base_model().activation_checkpointing_enable(
        {"use_reentrant": False, "context_fn": lambda: (Noted("forward"), Noted("recompute"))}
    )
    _gradients(model, forwards=1)
    assert entered.count("forward") == 3
    assert entered.count("recompute") == 3
