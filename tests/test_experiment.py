"""Settings: YAML, overrides, aliases; every mistake at once, with the nearest right word."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from loramix import ConfigError
from loramix.experiment import as_yaml, build, load

GOOD = {"output_dir": "runs/x", "data": {"domains": {"a": "a.jsonl", "b": "b.jsonl"}}}


def test_defaults_and_overrides():
    loaded = build(GOOD, ["adapter.r=16", "learning_rate=1e-4", "data.domains.c=c.jsonl", "--eta=0.3"])
    experiment = loaded.experiment
    assert experiment.adapter.r == 16
    assert experiment.settings({}).learning_rate == pytest.approx(1e-4)
    assert experiment.settings({}).losses["routing_cross_entropy"] == pytest.approx(0.3)
    assert list(experiment.data.domains) == ["a", "b", "c"]
    assert "read learning_rate as training.learning_rate" in loaded.echoes
    assert "read eta as training.losses.routing_cross_entropy" in loaded.echoes


def test_other_peoples_names_are_read_and_echoed():
    theirs = {
        "output_dir": "o",
        "data": GOOD["data"],
        "lora_rank": 4,
        "cutoff_len": 128,
        "micro_batch_size": 2,
        "base_model": "x/y",
        "num_epochs": "2",
    }
    loaded = build(theirs)
    assert loaded.experiment.adapter.r == 4
    assert loaded.experiment.data.max_length == 128
    assert loaded.experiment.model_name_or_path == "x/y"
    settings = loaded.experiment.settings({})
    assert (settings.per_device_train_batch_size, settings.num_train_epochs) == (2, 2.0)
    assert len(loaded.echoes) == 5


def test_stage_settings_go_over_the_common_ones():
    content = {
        **GOOD,
        "training": {"learning_rate": 1e-3, "num_train_epochs": 2},
        "joint_stage": {"learning_rate": "5e-4"},
    }
    experiment = build(content).experiment
    assert experiment.settings(experiment.expert_stage).learning_rate == pytest.approx(1e-3)
    assert experiment.settings(experiment.joint_stage).learning_rate == pytest.approx(5e-4)
    assert experiment.settings(experiment.joint_stage).num_train_epochs == 2


def test_resolved_yaml_reads_back_to_the_same():
    experiment = build({**GOOD, "training": {"max_steps": 3}}).experiment
    again = build(yaml.safe_load(as_yaml(experiment))).experiment
    assert again.settings({}) == experiment.settings({})
    assert again.model_dump(exclude={"training"}) == experiment.model_dump(exclude={"training"})


MISTAKES = {
    "unknown key": ({"outptu_dir": "x"}, 'Did you mean "output_dir"'),
    "unknown key in a section": ({"adapter": {"lora_alhpa": 1}}, 'Did you mean "lora_alpha"'),
    "unknown key in training": ({"training": {"learning_rat": 1}}, 'Did you mean "learning_rate"'),
    "wrong type": ({"training": {"max_steps": "many"}}, "training.max_steps = 'many': expected a int"),
    "fraction of a step": ({"training": {"max_steps": 1.5}}, "training.max_steps = 1.5"),
    "out of range": ({"data": {**GOOD["data"], "test_fraction": 2}}, "data.test_fraction = 2"),
    "unknown method": ({"method": "mao"}, 'Did you mean "moa"'),
    "bad adapter": ({"adapter": {"r": 0}}, "r = 0: a rank is at least 1"),
    "bad router": ({"adapter": {"router": {"pooling": "max"}}}, "router.pooling = 'max'"),
    "one domain": ({"data": {"domains": {"a": "a.jsonl"}}}, "Name at least two"),
    "no data": ({"data": {}}, "Name at least one domain"),
    "weights for others": (
        {"data": {**GOOD["data"], "mixing": "weights", "mixing_weights": {"z": 1}}},
        "expected the domains",
    ),
    "negative weight": (
        {"data": {**GOOD["data"], "mixing": "weights", "mixing_weights": {"a": -1, "b": 1}}},
        "expected 0 or more each",
    ),
    "name that is a path": ({"data": {"domains": {"../a": "a.jsonl", "b": "b.jsonl"}}}, "no name for a domain"),
    "no learning rate": ({"training": {"learning_rate": -1}}, "learning_rate = -1.0: expected more than 0"),
    "unknown schedule": ({"joint_stage": {"lr_scheduler_type": "cosin"}}, 'Did you mean "cosine"'),
    "no batch": ({"training": {"per_device_train_batch_size": 0}}, "expected at least 1"),
    "infinite steps": ({"training": {"max_steps": float("inf")}}, "training.max_steps = inf"),
    "controls of a control": ({"method": "lora", "controls": ["mixed"]}, "is its own control"),
    "weights unused": ({"data": {**GOOD["data"], "mixing_weights": {"a": 1, "b": 1}}}, "Set data.mixing to weights"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_explained(mistake):
    wrong, message = MISTAKES[mistake]
    with pytest.raises(ConfigError) as caught:
        build({**GOOD, **wrong})
    assert message in str(caught.value)


def test_all_mistakes_at_once():
    wrong = {**GOOD, "metod": "moa", "training": {"max_stepz": 1}, "adapter": {"r": "eight"}}
    with pytest.raises(ConfigError) as caught:
        build(wrong, ["nonsense", "lora_rnk=3"])
    message = str(caught.value)
    assert message.startswith("5 problems")
    for part in ("metod", "max_stepz", "adapter.r", "nonsense", "lora_rnk"):
        assert part in message


def test_unreadable_files(tmp_path: Path):
    with pytest.raises(ConfigError, match="cannot be read"):
        load(tmp_path / "missing.yaml")
    for text in ("a: [", "- 1", "!!python/object/apply:os.system ['true']", ""):
        (tmp_path / "x.yaml").write_text(text)
        with pytest.raises(ConfigError):
            load(tmp_path / "x.yaml")
