"""MoA on quantised bases: the gradients of the dequantised base, or a refusal. Needs `loramix[quant]`, else skipped."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM, TorchAoConfig

import loramix
from tests import tiny

IDS = tiny.ids(2, 9)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A base whose sizes the quantising kernels take."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=4, pad_token_id=0))
    folder = tmp_path_factory.mktemp("quantised")
    model.save_pretrained(folder)
    return str(folder)


def moa(base: nn.Module) -> Any:
    torch.manual_seed(1)
    config = loramix.LoramixConfig(method="moa", experts=["a", "b"], r=4, init_lora_weights=False)
    return get_peft_model(base.requires_grad_(False), config).train()


def learned(model: Any) -> tuple[float, dict[str, torch.Tensor]]:
    loss = model(input_ids=IDS, labels=tiny.labels(IDS), domain_ids=torch.tensor([0, 1])).loss
    loss.backward()
    return float(loss.detach()), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def dequantised(saved: str, model: Any) -> nn.Module:
    """The base with the weights that the quantised layers stand for: what they make of the unit matrix."""
    plain = AutoModelForCausalLM.from_pretrained(saved)
    layers = dict(model.get_base_model().named_modules())
    moved = 0.0
    with torch.no_grad():
        for name, linear in plain.named_modules():
            if isinstance(linear, nn.Linear) and hasattr(layers[name], "base_layer"):
                weight = layers[name].base_layer(torch.eye(linear.in_features)).T.float()
                moved += float((linear.weight - weight).norm())
                linear.weight.copy_(weight)
    assert moved > 0, "nothing was quantised, so nothing is shown"
    return plain


def check(saved: str, base: nn.Module, tolerance: float) -> None:
    model = moa(base)
    loss, gradients = learned(model)
    wanted_loss, wanted = learned(moa(dequantised(saved, model)))
    assert abs(loss - wanted_loss) <= 1e-5
    assert gradients.keys() == wanted.keys()
    for name, grad in wanted.items():
        assert (gradients[name] - grad).norm() <= tolerance * grad.norm(), name


def test_torchao_int8(saved: str):
    quantization = pytest.importorskip("torchao.quantization")
    config = TorchAoConfig(quantization.Int8WeightOnlyConfig())
    check(saved, AutoModelForCausalLM.from_pretrained(saved, quantization_config=config), 1e-4)


def test_bitsandbytes_8_bits(saved: str):
    pytest.importorskip("bitsandbytes")
    config = BitsAndBytesConfig(load_in_8bit=True)
    check(saved, AutoModelForCausalLM.from_pretrained(saved, quantization_config=config, device_map="cpu"), 1e-2)


def test_bitsandbytes_4_bits_on_a_cpu_answers_and_is_not_trained(saved: str):
    pytest.importorskip("bitsandbytes")
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    base = AutoModelForCausalLM.from_pretrained(saved, quantization_config=config, device_map="cpu")
    model = moa(base).eval()
    assert model.generate(IDS, expert="a", max_new_tokens=2).shape == (2, 11)
    with pytest.raises(loramix.ModelError, match="passes no gradient on"):
        learned(model.train())


def test_a_layer_without_gradient_is_refused_whoever_makes_it():
    """The same without bitsandbytes: by the layer's name and device."""
    linear = type("Linear4bit", (nn.Linear,), {})
    base = tiny.llama()
    base.model.layers[1].mlp.down_proj = linear(48, 32, bias=False)
    model = get_peft_model(base, loramix.LoramixConfig(method="lora")).train()
    with pytest.raises(loramix.ModelError, match=r"layers\.1\.mlp\.down_proj.* 4-bit layer"):
        model(input_ids=IDS, labels=IDS)
