"""Settings that cannot work are found before a model is loaded, all of them together."""

from __future__ import annotations

from pathlib import Path

import pytest

from loramix import ConfigError, LoramixConfig
from loramix.experiment import build, load
from loramix.methods import METHODS


def _problems(method: str, adapter: dict | None = None, domains: int = 2, **settings: object) -> str:
    content = {
        "output_dir": "nowhere",
        "method": method,
        "data": {"domains": {f"d{i}": f"d{i}.jsonl" for i in range(domains)}},
        "adapter": adapter or {},
        **settings,
    }
    with pytest.raises(ConfigError) as caught:
        build(content)
    return str(caught.value)


def test_the_issues_five_are_reported_at_once_without_a_model(monkeypatch: pytest.MonkeyPatch):
    def loaded(*_: object, **__: object) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", loaded)
    monkeypatch.setattr("loramix.models.base.base_folder", loaded)
    message = _problems(
        "mola",
        {"allocation": [1, 2, 4], "router": {"top_k": 3}, "backend": "grouped", "r": 6},
        training={"gradient_checkpointing_kwargs": {"use_reentrant": True}},
    )
    # written in a section, an alias of another tool is an unknown key; the canonical name is checked
    assert "gradient_checkpointing_kwargs" in message
    message = _problems(
        "mola",
        {"allocation": [1, 2, 4], "router": {"top_k": 3}, "backend": "grouped", "r": 6},
        gradient_checkpointing_kwargs={"use_reentrant": True},
    )
    for part in (
        "router.top_k = 3: expected 1 to 1",
        "allocation lists 3 layers, but the base has 30",
        "multiple of 4",
        "use_reentrant = true",
    ):
        assert part in message
    assert "4 problems" in message
    message = _problems("moa", {"r": 0}, domains=1)
    assert "moa mixes domains, but one is given" in message
    assert "r = 0" in message


def test_a_local_base_tells_its_layers(tmp_path: Path):
    (tmp_path / "config.json").write_text('{"num_hidden_layers": 3}')
    message = _problems("mola", {"allocation": "2468"}, model_name_or_path=str(tmp_path))
    assert "cuts the depth into 4 parts, but the base has 3 layers" in message


@pytest.mark.parametrize("name", METHODS)
def test_what_only_other_methods_read_is_refused(name: str):
    method = METHODS[name]
    foreign = {"losses": {"routing_cross_entropy": 1.0, "gate_balance": 1.0, "contrastive": 1.0}}
    message = _problems(name, training=foreign, adapter={"num_virtual_tokens": 3} if name != "prefix" else {"r": 4})
    refused = set(foreign["losses"]) - method.possible_losses
    assert all(f"losses.{loss}" in message for loss in refused)
    assert "num_virtual_tokens" in message if name != "prefix" else "adapter.r" in message


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"method": "mosld", "allocation": "20"}, "allocation = '20'"),
        ({"method": "mosld", "bank": {"weight_dropout": 1.0}}, "bank.weight_dropout = 1.0"),
        ({"method": "mola", "num_experts": 4, "bank": {"weight_dropout": 0.1}}, "bank.share is null"),
        ({"method": "mola", "num_experts": 1}, "router.top_k = 2"),
        ({"method": "mola", "num_experts": 4, "decision": "last"}, "settles no sequence"),
        ({"method": "mola", "num_experts": 4, "backend": "per_sequence"}, "routes by token"),
        ({"method": "moa", "experts": ["a", "b"], "backend": "grouped"}, "needs routing by token"),
        ({"method": "moa", "experts": ["a", "b"], "scope": "module"}, "defined with scope layer"),
        ({"method": "moa", "experts": ["a", "b"], "allocation": "24"}, "one expert for each name"),
        ({"method": "mola", "allocation": "24", "scope": "model"}, "one decision for all layers"),
        ({"method": "moelora-task", "num_experts": 8}, "domains: missing"),
        ({"method": "moelora-task", "num_experts": 8, "r": 12, "domains": ["a"]}, "Expected a multiple"),
        ({"method": "arrow", "experts": ["a", "b"], "bank": {"share": "down"}}, "starts from whole experts"),
        ({"method": "mola", "num_experts": 4, "bank": {"combine": "matrices"}}, "belongs to the method"),
        ({"method": "sira", "router": {"capacity_factor": 0}}, "router.capacity_factor = 0"),
        ({"method": "full"}, "is no loramix adapter"),
        ({"method": "mola", "num_experts": 4, "router": {"kind": "soft"}}, "has a topk router"),
    ],
)
def test_adapter_settings(settings: dict, said: str):
    with pytest.raises(ConfigError) as caught:
        LoramixConfig(**settings)
    assert said in str(caught.value)


@pytest.mark.parametrize("value", ["{}", "[1]", "'a'", "2026-11-23", "null", ".nan", "!!binary eA=="])
def test_a_router_setting_of_another_type_is_refused(value: str):
    with pytest.raises(ConfigError, match=r"router\.top_k = .*: input should be"):
        load(Path(__file__).parent.parent / "recipes" / "mola.yaml", [f"adapter.router.top_k={value}"])
