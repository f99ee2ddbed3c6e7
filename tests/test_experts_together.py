"""Stage 1 in one batch is stage 1 one expert after another: the same rows, clipping, schedules and ends."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from loramix import processes
from loramix.data.joint_steps import JointSteps, steps_alone
from loramix.errors import ConfigError
from loramix.experiment import build
from loramix.reports.reading import read
from tests import ended
from tests.test_trainer import _examples as examples

DOMAINS = ("adds", "greets", "shouts")


def _content(place: Path, **more: Any) -> dict[str, Any]:
    """Domains of different sizes, so that the experts take different numbers of steps, under clipping that bites."""
    content = ended.settings(place, "moa", max_steps=-1, num_train_epochs=2, max_grad_norm=0.05, warmup_steps=0.2)
    content["data"]["max_train_examples"] = {"adds": 17, "greets": 6, "shouts": 11}
    content["controls"], content["adapter"] = [], {"lora_dropout": 0.0}
    content["training"]["logging_steps"] = 1
    content["joint_stage"] = {"max_steps": 1}
    return {**content, **more}


def _experts(run: Path) -> dict[str, torch.Tensor]:
    return {
        f"{domain} {name}": weight
        for domain in DOMAINS
        for name, weight in load_file(run / "experts" / domain / "adapter_model.safetensors").items()
    }


@pytest.mark.parametrize("padding_free", [True, False])
def test_experts_are_those_of_one_after_another(tmp_path: Path, padding_free: bool):
    content = _content(tmp_path)
    content["training"]["padding_free"] = padding_free
    alone = ended.train(content, tmp_path / "alone")
    both = ended.train({**content, "experts_together": True}, tmp_path / "both")
    wanted, got = _experts(tmp_path / "alone"), _experts(tmp_path / "both")
    assert wanted.keys() == got.keys()
    for name, weight in wanted.items():
        torch.testing.assert_close(got[name], weight, rtol=1e-4, atol=2e-6, msg=name)
    taken = [alone["stages"][f"expert {domain}"]["steps"] for domain in DOMAINS]
    assert len(set(taken)) > 1
    assert taken == [both["stages"][f"expert {domain}"]["steps"] for domain in DOMAINS]
    for domain in DOMAINS:
        title = f"expert {domain}"
        assert alone["stages"][title]["tokens"] == both["stages"][title]["tokens"]
        files = [tmp_path / run / "experts" / domain / "adapter_config.json" for run in ("alone", "both")]
        assert files[0].read_text() == files[1].read_text()


def test_a_run_goes_on_from_its_checkpoint_bitwise(tmp_path: Path):
    content = {**_content(tmp_path), "experts_together": True, "adapter": {"lora_dropout": 0.1}}
    ended.train(content, tmp_path / "whole")
    log = [json.loads(line) for line in (tmp_path / "whole" / "log.jsonl").read_text().splitlines()]
    together = [entry for entry in log if entry["stage"] == "experts together" and "loss" in entry]
    for entry in together:
        assert 4 < entry["loss"] < 6, "a mean of the experts' losses, not their sum"
        assert "router_load_max" not in entry, "no router is taught"
    curves = read(tmp_path / "whole")["curves"]["lora/single"]
    assert {"adds", "greets", "shouts"} <= curves.keys()
    with ended.calls(*ended.STEP, ended.killed_at(6)), pytest.raises(ended.Killed):
        ended.train(content, tmp_path / "killed")
    ended.train(content, tmp_path / "killed", resume=True)
    whole, killed = _experts(tmp_path / "whole"), _experts(tmp_path / "killed")
    assert all(torch.equal(killed[name], weight) for name, weight in whole.items())


def test_steps_hold_the_rows_each_would_learn_alone():
    rows = examples(24)
    parts = [[row for row in rows if row.domain_id == domain] for domain in range(3)]
    trainings = [steps_alone(part, 2, 2, seed=0, steps=taken) for part, taken in zip(parts, (5, 2, 1), strict=True)]
    together = JointSteps(trainings)
    assert len(together) == 5
    assert [len(together[step]) for step in range(5)] == [
        sum(len(t[s]) for t in trainings if s < len(t)) for s in range(5)
    ]
    once = [row for step in trainings[0][:2] for row in step]
    assert len(once) == len(parts[0])
    assert {id(row) for row in once} == {id(row) for row in parts[0]}


def test_several_processes_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(processes, "count", lambda: 2)
    with pytest.raises(ConfigError, match="expected one"):
        ended.train({**_content(tmp_path), "experts_together": True}, tmp_path / "run")


@pytest.mark.parametrize(
    ("method", "expert_stage", "wanted"),
    [("mola", {}, "trains no expert alone"), ("moa", {"torch_compile": True}, "Leave one out")],
)
def test_what_does_not_go_together_is_said(tmp_path: Path, method: str, expert_stage: dict[str, Any], wanted: str):
    content = {**ended.settings(tmp_path, method), "experts_together": True, "expert_stage": expert_stage}
    with pytest.raises(ConfigError, match=wanted):
        build({**content, "output_dir": str(tmp_path / "run")})
