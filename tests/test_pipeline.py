"""How long each control trains: as many examples and as many updates as what it is compared with."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from rich.console import Console

from loramix.experiment import build
from loramix.pipeline import run_experiment
from tests import tiny


def _run(tmp_path: Path, **settings: object) -> dict:
    content = {
        "output_dir": str(tmp_path / "run"),
        "model_name_or_path": str(tiny.save_base(tmp_path / "base")),
        "controls": ["single_long", "mixed"],
        "data": {"domains": tiny.toy_domains(tmp_path / "data"), "max_length": 64},
        **settings,
    }
    with (tmp_path / "screen").open("w") as screen:
        return run_experiment(build(content).experiment, Console(file=screen))


@pytest.mark.parametrize("joint", [{"num_train_epochs": 1}, {"max_steps": 7}])
def test_controls_are_as_long_as_what_they_are_compared_with(tmp_path, joint):
    training = {"num_train_epochs": 2, "per_device_train_batch_size": 6}
    stages = _run(tmp_path, training=training, joint_stage=joint)["stages"]
    alone = [stages[f"expert {domain}"]["steps"] for domain in ("adds", "greets", "shouts")]
    assert alone == [8, 8, 8]
    assert stages["joint"]["steps"] == joint.get("max_steps", 12)
    assert stages["mixed"]["steps"] == sum(alone) + stages["joint"]["steps"]
    longer = [stages[f"longer {domain}"] for domain in ("adds", "greets", "shouts")]
    assert all(stage["steps"] == stages["joint"]["steps"] for stage in longer), "as many updates"
    assert sum(stage["tokens"] for stage in longer) == pytest.approx(stages["joint"]["tokens"], rel=0.05)


def test_a_run_can_be_opened_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    domains = {
        name: str(Path(path).relative_to(tmp_path)) for name, path in tiny.toy_domains(tmp_path / "data").items()
    }
    _run(tmp_path / "x", data={"domains": domains, "max_length": 64}, training={"max_steps": 1}, controls=[])
    config = (tmp_path / "x" / "run" / "config.yaml").read_text()
    assert f"adds: {tmp_path}/data/adds" in config


def test_no_room_for_an_answer_costs_no_results(tmp_path):
    base = tmp_path / "gpt2"
    tokenizer = tiny.tokenizer()
    tiny.gpt2(vocab=len(tokenizer)).save_pretrained(base)
    tokenizer.save_pretrained(base)
    results = _run(tmp_path, model_name_or_path=str(base), training={"max_steps": 1}, controls=[])
    assert results["examples"] == []
    assert json.loads((tmp_path / "run" / "results.json").read_text())["rows"]
