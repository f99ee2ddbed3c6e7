"""Numbers of parameters that the papers print (research notes 2.1 no. 9 and section 3), and experts by layer."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from loramix import ConfigError, LoramixConfig
from loramix.experts import experts_per_layer
from tests import tiny

LAYERS, WIDTH, FFN = 32, 4096, 11008
ALL_LINEAR = 4 * (WIDTH + WIDTH) + 3 * (WIDTH + FFN)
"""I + O summed over the seven linears of a layer."""


@pytest.fixture
def llama2_7b() -> nn.Module:
    """The shape of LLaMA-2-7B, without its weights."""
    config = LlamaConfig(
        vocab_size=32000,
        hidden_size=WIDTH,
        intermediate_size=FFN,
        num_hidden_layers=LAYERS,
        num_attention_heads=32,
        num_key_value_heads=32,
    )
    with torch.device("meta"):
        return LlamaForCausalLM(config)


def _trained(base: nn.Module, **settings: object) -> dict[str, int]:
    """Trainable parameters of the parts."""
    with torch.device("meta"):
        model = get_peft_model(base, LoramixConfig(**settings))
    parts = {"bank": 0, "router": 0}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parts[name.partition(".loramix_")[2].partition(".")[0]] += parameter.numel()
    return parts


PRINTED = {
    "LoRA r = 8 on q and v (MoSLD, table 5)": (
        {"method": "lora", "r": 8, "target_modules": "qv-linear"},
        (4_194_304, 0),
    ),
    "MoLA 2468 on q and v (MoSLD, table 5)": (
        {"method": "mola", "target_modules": "qv-linear"},
        (20_971_520, 1_310_720),
    ),
    "MoSLD 2468 (MoSLD, table 5)": ({"method": "mosld"}, (12_582_912, 1_310_720)),
    "MoLA 2468 on all linears (MoLA)": ({"method": "mola"}, (99_942_400, 5_693_440)),
}


@pytest.mark.parametrize("row", PRINTED)
def test_printed_numbers(llama2_7b: nn.Module, row: str):
    settings, (bank, router) = PRINTED[row]
    assert _trained(llama2_7b, **settings) == {"bank": bank, "router": router}


def test_sums_are_the_papers():
    sums = [bank + router for _, (bank, router) in PRINTED.values()]
    assert sums == [4_194_304, 22_282_240, 13_893_632, 105_635_840]


FORMULAS = {
    "moelora-task": (
        {"num_experts": 8, "domains": ["a", "b", "c"], "r": 16},
        LAYERS * 16 * ALL_LINEAR,
        LAYERS * 7 * (8 + 3) * 64,
    ),
    "hydralora": (
        {"num_experts": 4, "r": 4},
        LAYERS * 4 * (2 * (WIDTH + 4 * FFN) + (FFN + 4 * WIDTH)),
        LAYERS * 4 * (2 * WIDTH + FFN),
    ),
    "mosld-b": (
        {"allocation": "5555"},
        LAYERS * 2 * 8 * (5 * WIDTH + WIDTH),
        LAYERS * 2 * 5 * WIDTH,
    ),
    "mixlora": (
        {"num_experts": 8, "r": 16},
        LAYERS * 16 * (4 * 2 * WIDTH + 8 * 3 * (WIDTH + FFN)),
        LAYERS * 8 * WIDTH,
    ),
    "llava-mole": (
        {"num_experts": 3, "r": 32},
        LAYERS * 32 * (4 * 2 * WIDTH + 3 * 3 * (WIDTH + FFN)),
        LAYERS * 3 * WIDTH,
    ),
    "mole": ({"experts": ["a", "b", "c"]}, 0, LAYERS * (3 * 3 * WIDTH + 1)),
    "arrow": ({"experts": ["a", "b", "c"]}, 0, 0),
    "lorahub": ({"experts": ["a", "b", "c"]}, 0, 3),
}


@pytest.mark.parametrize("method", FORMULAS)
def test_formulas(llama2_7b: nn.Module, method: str):
    settings, bank, router = FORMULAS[method]
    assert _trained(llama2_7b, method=method, **settings) == {"bank": bank, "router": router}


# ---- experts by layer ---------------------------------------------------------------------------------------------


def _by_layer(model: PeftModel) -> list[int]:
    return [row.experts for row in model.adapted_modules() if row.module.endswith("q_proj")]


def test_quarters_of_a_depth_that_is_no_multiple_of_four():
    assert experts_per_layer("2468", 8, 32) == [2] * 8 + [4] * 8 + [6] * 8 + [8] * 8
    assert experts_per_layer("2468", 8, 30) == [2] * 8 + [4] * 7 + [6] * 8 + [8] * 7
    assert experts_per_layer("8642", 8, 40) == [8] * 10 + [6] * 10 + [4] * 10 + [2] * 10
    assert experts_per_layer("5", 5, 3) == [5, 5, 5]
    assert experts_per_layer("uniform", 7, 2) == experts_per_layer(None, 7, 2) == [7, 7]


@pytest.mark.parametrize("allocation", ["234", [2, 3, 4]])
def test_layers_have_the_experts_of_their_place(allocation: str | list[int]):
    model = get_peft_model(tiny.llama(), LoramixConfig(method="mola", allocation=allocation))
    assert _by_layer(model) == [2, 3, 4]
    assert model.experts == ["expert_0", "expert_1", "expert_2", "expert_3"]
    model(input_ids=tiny.ids())
    assert {r.probabilities.shape[1] for s, r in model.routings.items() if s.startswith("layers.1")} == {3}


def test_allocations_that_do_not_fit_are_explained():
    with pytest.raises(ConfigError, match="lists 2 layers, but the base has 3"):
        get_peft_model(tiny.llama(), LoramixConfig(method="mola", allocation=[2, 3]))
    with pytest.raises(ConfigError, match="4 parts, but the base has 3"):
        get_peft_model(tiny.llama(), LoramixConfig(method="mola", allocation="2468"))
    with pytest.raises(ConfigError, match="top_k = 3: expected 1 to 2"):
        LoramixConfig(method="mola", allocation="2468", router={"top_k": 3})
    for wrong in ("24x8", "2048", [2, 0, 4], []):
        with pytest.raises(ConfigError, match="allocation"):
            LoramixConfig(method="mola", allocation=wrong)
    with pytest.raises(ConfigError, match="one expert for each name"):
        LoramixConfig(method="moe-lora", experts=["a", "b"], allocation="24")
