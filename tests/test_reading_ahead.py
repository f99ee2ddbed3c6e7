"""Prompts read once give the steps that reading them in each step gives, and are read only where that pays."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from loramix.data.collation import Collator, Example
from loramix.data.padding_free import PaddingFreeCollator
from loramix.models.segment_attention import segment_attention
from loramix.training import reading_ahead
from loramix.training.arguments import training_arguments
from loramix.training.reading_ahead import read_ahead
from loramix.training.settings import TrainingSettings
from loramix.training.stages import numbered
from loramix.training.trainer import MixtureTrainer
from tests import method_cases as cases
from tests import tiny
from tests.test_padding_free import examples

EPOCHS = TrainingSettings(num_train_epochs=2.0)


def _learned(model: Any, batch: dict[str, Any], states: dict[str, Tensor] | None) -> tuple[dict[str, Tensor], int]:
    """The gradients of one step, and how many forwards of the base it took."""
    settings = TrainingSettings(max_steps=1)
    trainer = MixtureTrainer(
        model.train(),
        settings=settings,
        domains=tiny.EXPERTS,
        auxiliary={"routing_cross_entropy": 1.0},
        args=training_arguments(settings, "unused"),
        train_dataset=[batch],
        prompt_states=states,
    )
    batches, _ = trainer.get_batch_samples(iter([batch]), 1, torch.device("cpu"))
    forwards: list[int] = []
    hook = model.get_base_model().get_input_embeddings().register_forward_hook(lambda *_: forwards.append(1))
    model.zero_grad()
    with segment_attention(model):
        trainer.compute_loss(model, batches[0]).backward()
    hook.remove()
    return {name: one.grad for name, one in model.named_parameters() if one.grad is not None}, len(forwards)


@pytest.mark.parametrize("collator", [Collator(tiny.PAD), PaddingFreeCollator()])
def test_a_step_is_the_same(collator: Any):
    model = tiny.moa(tiny.llama(layers=2))
    others = [replace(one, domain_id=(one.domain_id + 1) % 3) for one in examples([(6, 2), (8, 5)])]
    made = numbered([*others, *examples()])
    states = read_ahead(model, made, EPOCHS, 1, tiny.PAD)
    assert states is not None
    assert all(len(one) == len(made) for one in states.values())
    batch = collator([made[5], made[2], made[4]])
    wanted, forwards = _learned(model, batch, None)
    got, fewer = _learned(model, batch, states)
    assert (forwards, fewer) == (2, 1)
    for name, gradient in wanted.items():
        torch.testing.assert_close(got[name], gradient, rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        (TrainingSettings(num_train_epochs=1.0), "each is seen once"),
        (TrainingSettings(max_steps=1, per_device_train_batch_size=4), "each is seen once"),
        (replace(EPOCHS, read_ahead=False), "switched off"),
    ],
)
def test_prompts_are_not_read_where_it_does_not_pay(settings: TrainingSettings, why: str):
    model, made = tiny.moa(tiny.llama(layers=1)), numbered(examples())
    assert read_ahead(model, made, settings, 1, tiny.PAD) is None, why
    assert read_ahead(model, made, EPOCHS, 1, tiny.PAD) is not None


def test_states_that_take_too_much_memory_are_not_kept(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(reading_ahead, "MOST_BYTES", 100)
    assert read_ahead(tiny.moa(tiny.llama(layers=1)), numbered(examples()), EPOCHS, 1, tiny.PAD) is None


@pytest.mark.parametrize("method", ["lora", "mola", "moa experts"])
def test_only_routers_that_read_the_base_have_their_prompts_read(method: str):
    base = tiny.llama(layers=2)
    model = tiny.moa(base, router={"reads": "experts"}) if method == "moa experts" else cases.build(method, base)
    made: list[Example] = numbered(examples())
    assert read_ahead(model, made, EPOCHS, 1, tiny.PAD) is None
