"""What an independent review found in the methods, held so that it does not come back."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from peft import get_peft_model
from torch import nn
from transformers import BartConfig, BartForConditionalGeneration

from loramix import ConfigError, LoramixConfig
from tests import tiny


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])  # noqa: S301
def test_a_copy_of_a_model_works_and_remembers_nothing(duplicate):
    model = tiny.moa()
    wanted = model(input_ids=tiny.ids()).logits
    again = duplicate(model)
    assert again.routings == {}
    assert torch.equal(again(input_ids=tiny.ids()).logits, wanted)
    assert again.generate(input_ids=tiny.ids(), max_new_tokens=3).shape == (3, 13)


def test_a_bias_that_is_trained_gets_its_gradient():
    base = tiny.llama()
    for layer in base.model.layers:
        layer.self_attn.q_proj = nn.Linear(32, 32).requires_grad_(False)
    model = get_peft_model(base, LoramixConfig(method="mola", num_experts=3, init_lora_weights=False)).train()
    biases = [p for name, p in model.named_parameters() if name.endswith("q_proj.base_layer.bias")]
    for bias in biases:
        bias.requires_grad_(True)
    model(input_ids=tiny.ids(), labels=tiny.ids()).loss.backward()
    assert len(biases) == 3
    assert all(bias.grad is not None and bias.grad.abs().sum() > 0 for bias in biases)


def test_uniform_keeps_the_methods_own_number_of_experts():
    assert LoramixConfig(method="mixlora", allocation="uniform").num_experts == 8
    with pytest.raises(ConfigError, match="num_experts: missing"):
        LoramixConfig(method="mosld", allocation="uniform")


@pytest.mark.parametrize("name", ["mole", "arrow", "lorahub"])
def test_experts_that_are_only_routed_stay_frozen(name):
    model = get_peft_model(tiny.llama(), LoramixConfig(method=name, experts=tiny.EXPERTS))
    for asked in (lambda: model.set_requires_grad("default"), lambda: model.set_adapter("default")):
        asked()
        trained = [n for n, p in model.named_parameters() if p.requires_grad]
        assert not any("loramix_bank" in n for n in trained)
        assert bool(trained) == (name != "arrow")


def test_unloading_forgets_the_last_forward():
    model = get_peft_model(tiny.llama(), LoramixConfig(method="mola", num_experts=3))
    model(input_ids=tiny.ids())
    guide = model.base_model.guide
    assert guide.context.call is not None
    model.unload()
    assert guide.context.call is None


def test_generate_refuses_contradictions():
    with pytest.raises(ConfigError, match="contradict each other"):
        tiny.moa().generate(input_ids=tiny.ids(), domain_ids=torch.tensor([0, 1, 2]), expert="blue")
    task = LoramixConfig(method="moelora-task", domains=tiny.EXPERTS)
    with pytest.raises(ConfigError, match="contradict each other"):
        get_peft_model(tiny.llama(), task).generate(
            input_ids=tiny.ids(), domain_ids=torch.tensor([0, 1, 2]), decision="vote"
        )


def test_two_stacks_of_layers_are_refused():
    config = BartConfig(
        vocab_size=64,
        d_model=16,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=16,
        decoder_ffn_dim=16,
        max_position_embeddings=32,
    )
    base = BartForConditionalGeneration(config)
    settings = {"method": "mola", "num_experts": 3, "task_type": None}
    with pytest.raises(ConfigError, match=r"2 stacks \(model\.decoder\.layers, model\.encoder\.layers\)"):
        get_peft_model(base, LoramixConfig(**settings))
    alone = LoramixConfig(**settings, target_modules=r".*decoder\.layers\.\d+\.self_attn\.(q|v)_proj")
    assert len(get_peft_model(base, alone).base_model.adapted_modules()) == 4
