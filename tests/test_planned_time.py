"""The time of a plan comes from true steps on few layers: what is made of them, and that nothing else is touched."""

from __future__ import annotations

import copy
import os
import random
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from peft import get_peft_model
from transformers import CONFIG_MAPPING, LlamaConfig

from loramix import LoramixConfig
from loramix.data.collation import Example
from loramix.data.prompts import Encoded
from loramix.experiment import build
from loramix.models import load_skeleton
from loramix.models.few_layers import few_layers
from loramix.planning import pace, timed_steps
from loramix.planning.dry_run import LongRow
from loramix.planning.dry_step import DryStep
from loramix.planning.few_layers import FewLayers
from loramix.planning.kept_random import kept_random
from loramix.planning.seconds import Amount, Stopwatch
from loramix.planning.timed_steps import Times, _Clock
from loramix.planning.work import Work
from loramix.training.settings import TrainingSettings
from loramix.training.trainer import MixtureTrainer
from tests import tiny

LENGTH, PROMPT = 32, 12
SETTINGS = TrainingSettings(per_device_train_batch_size=2, head_chunk=8)


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timed_steps, "MOST", 2)
    monkeypatch.setattr(pace, "TURNS", 1)


def _base(folder: Path, layers: int) -> str:
    """A base of which there are settings and no weights."""
    LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        architectures=["LlamaForCausalLM"],
    ).save_pretrained(folder)
    return str(folder)


def _example(length: int = LENGTH, domain: int = 0) -> Example:
    return Example(Encoded([5] * length, [i >= PROMPT for i in range(length)], PROMPT), domain)


def _config(method: str = "lora", **other: Any) -> LoramixConfig:
    experts = {"lora": ["mixed"], "moa": ["a", "b", "c"]}.get(method)
    return LoramixConfig(**{"method": method, "r": 4, "experts": experts, "target_modules": "all-linear", **other})


def _seconds(
    base: str, config: LoramixConfig, tokens: float = 64, settings: TrainingSettings = SETTINGS, **work: Any
) -> tuple[float, str]:
    content = {"method": "lora", "model_name_or_path": base, "output_dir": "x", "data": {"domains": {"a": "x"}}}
    watch = Stopwatch(build(content).experiment, [_example(domain=place % 3) for place in range(4)])
    dry = DryStep(settings, LongRow(64, 40, LENGTH, head_chunk=8, apart=True))
    with kept_random():
        whole = dry(get_peft_model(load_skeleton(base), copy.deepcopy(config)).train())
        given = Work(config, settings, {}, **{"taught": True, **work})
        return watch.seconds(given, Amount(tokens, tokens / 2, steps=tokens / 64), whole, dry)


def _as_reckoned(work: Work, model: Any, batches: list[list[Example]]) -> Times:
    """A machine that takes a second for a token in a layer, two outside, five where it is learned."""
    layers = len(model.get_base_model().model.layers)
    learning = [
        sum(row.length for row in batch) * (layers + 2.0) + 5 * sum(row.supervised_tokens for row in batch)
        for batch in batches
    ]
    trained = sum(one.numel() for one in model.parameters() if one.requires_grad)
    return Times(learning, 0.5 * trained, trained)


@pytest.mark.parametrize("again", [False, True], ids=["kept", "run again"])
@pytest.mark.parametrize("layers", [1, 3, 8, 20])
def test_the_whole_is_reckoned_from_few_layers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layers: int, again: bool
):
    timed = []

    def once(work: Work, model: Any, batches: list[list[Example]]) -> Times:
        timed.append(model)
        return _as_reckoned(work, model, batches)

    monkeypatch.setattr(pace, "timed_steps", once)
    settings = replace(SETTINGS, activation_checkpointing=again)
    base = _base(tmp_path, layers)
    model = get_peft_model(load_skeleton(base), _config())
    trained = sum(one.numel() for one in model.parameters() if one.requires_grad)
    for tokens in (64, 640):
        seconds, note = _seconds(base, _config(), tokens, settings)
        assert note == ""
        assert seconds == pytest.approx(tokens * (layers + 2 + 2.5) + tokens / 64 * 0.5 * trained)
    assert len(timed) == 2 * min(layers, 2), "one layer is one model"


@pytest.mark.parametrize(
    ("method", "other"),
    [("lora", {}), ("moa", {}), ("mola", {"allocation": "2468"}), ("lora", {"layers_to_transform": [7, 8]})],
)
def test_steps_are_timed_without_weights_and_nothing_else_changes(tmp_path: Path, method: str, other: dict[str, Any]):
    base, config = _base(tmp_path, 9), _config(method, **other)

    def state() -> tuple[Any, ...]:
        numbers = (torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist())
        return (*numbers, dict(os.environ), torch.get_default_dtype(), torch.get_num_threads())

    before = state()
    seconds, note = _seconds(base, config, ahead=method == "moa")
    assert note == ""
    assert 0 < seconds < 60
    assert state() == before


def test_what_cannot_be_timed_is_guessed_with_a_note(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=1000))
    seconds, note = _seconds(_base(tmp_path, 3), _config())
    assert seconds > 0
    assert "rough guess" in note
    assert "a few layers take" in note


def _few(skeleton: Any, config: LoramixConfig) -> FewLayers:
    return FewLayers(skeleton, torch.float32, config, taught=True)


def _adapted(model: Any) -> set[str]:
    return {name for name, module in model.get_base_model().named_modules() if hasattr(module, "loramix_bank")}


@pytest.mark.parametrize(
    "given",
    [
        {"target_modules": r".*layers\.(8|9|10|11)\..*(q_proj|v_proj)"},
        {"target_modules": r".*layers\.(0|1|2|3)\..*(q_proj|v_proj)"},
        {"target_modules": ["q_proj", "v_proj"], "layers_to_transform": [3, 11], "layers_pattern": "layers"},
        {"target_modules": ["layers.2.self_attn.q_proj", "layers.2.self_attn.v_proj"]},
        {"target_modules": "all-linear", "exclude_modules": r".*(layers\.[3-9].*|k_proj|o_proj|.*mlp.*)"},
    ],
)
def test_few_layers_are_adapted_where_the_whole_is(tmp_path: Path, given: dict[str, Any]):
    base, config = _base(tmp_path, 12), _config(**given)
    whole = _adapted(get_peft_model(load_skeleton(base), copy.deepcopy(config)))
    few = _few(load_skeleton(base), config)
    for number in (1, 2, 4, 8):
        wanted = {
            f"model.layers.{place}.self_attn.{projection}"
            for place, layer in enumerate(few.chosen(number))
            for projection in ("q_proj", "v_proj")
            if f"model.layers.{layer}.self_attn.{projection}" in whole
        }
        assert wanted
        assert _adapted(few.model(number, "meta")) == wanted
    assert _seconds(base, config)[1] == ""


SMALL = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "vocab_size": 64,
    "num_hidden_layers": 8,
}
MIXED = [
    ("qwen3_moe", {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "mlp_only_layers": [0, 5]}),
    (
        "qwen2_moe",
        {
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 16,
            "shared_expert_intermediate_size": 16,
            "decoder_sparse_step": 2,
        },
    ),
    (
        "deepseek_v3",
        {
            "first_k_dense_replace": 3,
            "n_routed_experts": 8,
            "n_group": 2,
            "topk_group": 1,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 16,
            "q_lora_rank": 8,
            "kv_lora_rank": 8,
            "qk_rope_head_dim": 4,
            "qk_nope_head_dim": 8,
            "v_head_dim": 8,
        },
    ),
    (
        "llama4_text",
        {
            "interleave_moe_layer_step": 2,
            "intermediate_size_mlp": 48,
            "num_local_experts": 4,
            "head_dim": 8,
            "pad_token_id": 0,
        },
    ),
]


@pytest.mark.parametrize(("kind", "given"), MIXED, ids=[kind for kind, _ in MIXED])
def test_few_layers_of_a_base_with_experts_of_its_own_are_its_layers(tmp_path: Path, kind: str, given: dict[str, Any]):
    CONFIG_MAPPING[kind](**SMALL, **given).save_pretrained(tmp_path)
    config = _config(target_modules=["o_proj"])
    skeleton = load_skeleton(str(tmp_path))
    few = _few(skeleton, config)
    sizes = {sum(one.numel() for one in layer.parameters()) for layer in skeleton.model.layers}
    assert len(sizes) == 2, "some layers have experts, some have none"
    made = few.model(4, "cpu").unload().model.layers
    for place, layer in enumerate(few.chosen(4)):
        assert _shapes(made[place]) == _shapes(skeleton.model.layers[layer])
    assert {sum(one.numel() for one in layer.parameters()) for layer in made} == sizes
    if kind != "llama4_text":  # no base whose decoder transformers cannot name has a plan
        assert _seconds(str(tmp_path), config)[1] == ""


def _shapes(layer: Any) -> dict[str, tuple[str, Any]]:
    return {name: (type(one).__name__, one.shape) for name, one in layer.named_parameters()}


def test_few_layers_compute_as_the_base_does(tmp_path: Path):
    skeleton = load_skeleton(_base(tmp_path, 6))
    made = few_layers(skeleton, [1, 4], torch.bfloat16, "cpu")
    assert {one.dtype for one in made.parameters()} == {torch.bfloat16}
    assert not any(one.requires_grad for one in made.parameters())
    true = tiny.llama().model.rotary_emb.inv_freq
    assert torch.equal(made.model.rotary_emb.inv_freq, true), "angles are not random"
    assert made.config.num_hidden_layers == len(made.model.layers) == 2
    assert len(skeleton.model.layers) == skeleton.config.num_hidden_layers == 6
    logits = made(input_ids=tiny.ids()).logits
    assert torch.isfinite(logits).all()
    assert logits.std() > 0


def test_layers_of_every_kind_are_kept():
    by_depth = _few(tiny.llama(layers=12), _config("mola", allocation="2468"))
    assert by_depth.chosen(4) == [2, 5, 8, 11]
    assert [by_depth.experts[layer] for layer in by_depth.chosen(4)] == [2, 4, 6, 8]
    some = _few(tiny.llama(layers=6), _config(layers_to_transform=[0, 1]))
    assert some.chosen(1) == [1]
    assert len(set(some.chosen(2)) & {0, 1}) == 1


def test_rows_are_like_those_of_a_stage():
    examples = [_example(length) for length in range(20, 120)]
    rows = pace.typical_rows(examples, TrainingSettings(per_device_train_batch_size=4))
    assert [row.length for row in rows] == [32, 57, 82, 107]
    few = pace.typical_rows(examples, TrainingSettings(per_device_train_batch_size=64))
    assert 700 < sum(row.length for row in few) <= pace.MOST_TOKENS
    (end,) = pace.typical_rows([_example(3000)], TrainingSettings())
    assert (end.length, end.supervised_tokens) == (1024, 1023)


def test_clipping_counts_once_a_step(monkeypatch: pytest.MonkeyPatch):
    """By a clock that goes on when batches are learned, gradients clipped, and numbers updated."""
    now = [0.0]

    def taking(seconds: float, done: Any) -> Any:
        def longer(self: Any, *args: Any, **kwargs: Any) -> Any:
            now[0] += seconds
            return done(self, *args, **kwargs)

        return longer

    monkeypatch.setattr(MixtureTrainer, "training_step", taking(5.0, MixtureTrainer.training_step))
    monkeypatch.setattr(MixtureTrainer, "_clip_grad_norm", taking(2.0, MixtureTrainer._clip_grad_norm))
    monkeypatch.setattr(torch.optim.AdamW, "step", taking(1.0, torch.optim.AdamW.step))
    monkeypatch.setattr(timed_steps, "_Clock", lambda kinds: clock(kinds, now=lambda: now[0]))
    clock = _Clock
    model = get_peft_model(tiny.llama(), _config()).train()
    with kept_random():
        times = timed_steps.timed_steps(Work(_config(), SETTINGS, {}), model, [[_example()], [_example()]])
    assert times.learning == [5.0, 5.0]
    assert times.update == 3.0


def test_works_of_one_pace_are_one_kind():
    one, other = (Work(_config(experts=[name]), SETTINGS, {}) for name in ("a", "b"))
    assert one.kind() == other.kind()
    assert one.kind() != Work(_config(experts=["a"], r=8), SETTINGS, {}).kind()
    assert one.kind() != Work(_config(experts=["a"]), TrainingSettings(head_chunk=8), {}).kind()
