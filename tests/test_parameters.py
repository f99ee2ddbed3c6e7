"""Numbers of parameters by formula (research notes, MoA 1.1), on the meta device, and what is adapted."""

from __future__ import annotations

import pytest
import torch
from peft import get_peft_model
from torch import nn

from loramix import LoramixConfig, ModelError
from loramix.models.targets import first_of_each, layer_of
from loramix.tuner import check_fit
from tests import tiny


class _QwenBlock(nn.Module):
    """The linears of a Qwen-7B block, under their own names, in its sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.ModuleDict({"c_attn": nn.Linear(4096, 12288), "c_proj": nn.Linear(4096, 4096, bias=False)})
        self.mlp = nn.ModuleDict(
            {
                "w1": nn.Linear(4096, 11008, bias=False),
                "w2": nn.Linear(4096, 11008, bias=False),
                "c_proj": nn.Linear(11008, 4096, bias=False),
            }
        )


class _Qwen(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.h = nn.ModuleList(_QwenBlock() for _ in range(32))


def test_moa_parameters_of_the_paper():
    domains = [f"domain_{i}" for i in range(8)]
    with torch.device("meta"):
        config = LoramixConfig(experts=domains, r=64, target_modules="all-linear", task_type=None)
        model = get_peft_model(_Qwen(), config)
    bank = sum(p.numel() for n, p in model.named_parameters() if "loramix_bank" in n)
    routers = sum(p.numel() for n, p in model.named_parameters() if "loramix_router" in n)
    assert bank == 8 * 143_130_624
    assert routers == 1_050_624
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 8 * 143_130_624 + 1_050_624


def test_table_of_adapted_modules_adds_up():
    model = tiny.moa()
    table = model.adapted_modules_table()
    assert f"{sum(p.numel() for p in model.parameters() if p.requires_grad):,} parameters" in table
    rows = model.adapted_modules()
    assert [row.module for row in rows if row.router] == [f"model.layers.{i}.self_attn.q_proj" for i in range(3)]
    assert all(row.scope == f"layers.{row.module.split('.')[2]}" for row in rows)


def test_conv1d_sizes_are_not_transposed():
    rows = {row.module: row for row in tiny.moa(tiny.gpt2()).adapted_modules()}
    assert (rows["transformer.h.0.attn.c_attn"].inputs, rows["transformer.h.0.attn.c_attn"].outputs) == (32, 96)
    assert rows["transformer.h.0.attn.c_attn"].router


def test_unmatched_targets_are_all_named_with_near_misses():
    with pytest.raises(ModelError) as caught:
        tiny.moa(target_modules=["q_porj", "up_projj", "v_proj"])
    message = str(caught.value)
    assert "2 problems" in message
    assert '"q_porj" matches no module' in message
    assert 'Did you mean "q_proj"' in message
    assert 'Did you mean "up_proj"' in message


def test_targets_that_are_no_linear_are_refused():
    with pytest.raises(ModelError, match="not a linear layer"):
        tiny.moa(target_modules=["embed_tokens", "q_proj"])


def test_regular_expressions_and_layers():
    model = tiny.moa(target_modules=r".*\.(q_proj|down_proj)")
    assert len(model.adapted_modules()) == 6
    model = tiny.moa(target_modules=["q_proj"], layers_to_transform=[1])
    assert [row.module for row in model.adapted_modules()] == ["model.layers.1.self_attn.q_proj"]
    with pytest.raises(ModelError, match="matches no module"):
        tiny.moa(target_modules=r".*\.nothing")


def test_router_sits_at_the_first_module_that_runs():
    assert layer_of("model.layers.3.self_attn.q_proj") == "layers.3"
    assert layer_of("transformer.h.11.attn.c_attn") == "h.11"
    assert layer_of("lm_head") == "model"
    stored_order = ["layers.0.self_attn.o_proj", "layers.0.self_attn.qkv_proj", "layers.0.mlp.down_proj"]
    assert first_of_each(stored_order, layer_of) == {"layers.0": "layers.0.self_attn.qkv_proj"}
    in_mlp = ["layers.0.mlp.up_proj", "layers.0.mlp.down_proj"]
    assert first_of_each(in_mlp, layer_of) == {"layers.0": "layers.0.mlp.up_proj"}


@pytest.mark.parametrize("layers", [[0], [1], [0, 2], 2])
def test_layers_of_all_linears(layers):
    model = tiny.moa(layers_to_transform=layers)
    wanted = {f"layers.{n}" for n in ([layers] if isinstance(layers, int) else layers)}
    assert {row.scope for row in model.adapted_modules()} == wanted
    assert len(model.adapted_modules()) == 7 * len(wanted)
    assert set(model.route(input_ids=tiny.ids(), decision="vote")[0].votes) == wanted


def test_selecting_nothing_is_refused():
    with pytest.raises(ModelError, match="layers 0 to 2"):
        tiny.moa(layers_to_transform=[99])
    with pytest.raises(ModelError, match="no regular expression"):
        check_fit(tiny.llama(), LoramixConfig(experts=tiny.EXPERTS, target_modules="q_proj|("))
    with pytest.raises(ModelError, match="selects no module"):
        tiny.moa(exclude_modules=".*")
