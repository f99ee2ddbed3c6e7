"""The time of a plan comes from true steps on few layers: what is made of them, and that nothing else is touched."""

from __future__ import annotations

import copy
import os
import random
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from peft import get_peft_model
from transformers import LlamaConfig

from loramix import LoramixConfig
from loramix.data.collation import Example
from loramix.data.prompts import Encoded
from loramix.experiment import build
from loramix.models import load_skeleton
from loramix.planning import pace, timed_steps
from loramix.planning.dry_run import DryRun, dry_run
from loramix.planning.few_layers import FewLayers
from loramix.planning.kept_random import kept_random
from loramix.planning.seconds import Amount, Stopwatch, Work
from loramix.planning.timed_steps import Times
from loramix.training.settings import TrainingSettings

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


def _seconds(base: str, config: LoramixConfig, tokens: float = 64, **work: Any) -> tuple[float, str]:
    content = {"method": "lora", "model_name_or_path": base, "output_dir": "x", "data": {"domains": {"a": "x"}}}
    watch = Stopwatch(build(content).experiment, [_example(domain=place % 3) for place in range(4)])
    dry: Any = partial(
        dry_run, tokens=64, learned=40, row=LENGTH, head_chunk=8, told=config.method == "moa", by_row=True
    )
    with kept_random():
        whole: DryRun = dry(get_peft_model(load_skeleton(base), copy.deepcopy(config)).train())
    given = Work(config, SETTINGS, {}, **{"taught": True, **work})
    return watch.seconds(given, Amount(tokens, tokens / 2, steps=tokens / 64), whole, dry, 64)


def _as_reckoned(
    settings: TrainingSettings, losses: dict[str, float], ahead: bool, model: Any, batches: list[list[Example]]
) -> Times:
    """A machine that takes a second for a token in a layer, two outside, five where it is learned."""
    layers = len(model.get_base_model().model.layers)
    learning = [
        sum(row.length for row in batch) * (layers + 2.0) + 5 * sum(row.supervised_tokens for row in batch)
        for batch in batches
    ]
    trained = sum(one.numel() for one in model.parameters() if one.requires_grad)
    return Times(learning, 0.5 * trained, trained)


@pytest.mark.parametrize("layers", [1, 3, 8, 20])
def test_the_whole_is_reckoned_from_few_layers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layers: int):
    monkeypatch.setattr(pace, "timed_steps", _as_reckoned)
    base = _base(tmp_path, layers)
    model = get_peft_model(load_skeleton(base), _config())
    trained = sum(one.numel() for one in model.parameters() if one.requires_grad)
    for tokens in (64, 640):
        seconds, note = _seconds(base, _config(), tokens)
        assert note == ""
        assert seconds == pytest.approx(tokens * (layers + 2 + 2.5) + tokens / 64 * 0.5 * trained)


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


def test_layers_of_every_kind_are_kept():
    experiment: Any = None
    by_depth = FewLayers(experiment, _config("mola", allocation="2468"), 12, taught=True)
    assert by_depth.chosen(4) == [2, 5, 8, 11]
    assert [by_depth.experts[layer] for layer in by_depth.chosen(4)] == [2, 4, 6, 8]
    some = FewLayers(experiment, _config(layers_to_transform=[0, 1]), 6, taught=True)
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


def test_works_of_one_pace_are_one_kind():
    one, other = (Work(_config(experts=[name]), SETTINGS, {}) for name in ("a", "b"))
    assert one.kind() == other.kind()
    assert one.kind() != Work(_config(experts=["a"], r=8), SETTINGS, {}).kind()
    assert one.kind() != Work(_config(experts=["a"]), TrainingSettings(head_chunk=8), {}).kind()
