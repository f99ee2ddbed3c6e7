"""`loramix calibrate RUN` on a tiny run: adapter, figures, report; what cannot be calibrated is refused."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from loramix import ConfigError, DataError
from loramix.adapters.adapter import read_adapter
from loramix.cli.calibrate import calibrate
from loramix.cli.main import run as loramix
from loramix.opening import open_model, open_run
from loramix.reports.markdown import markdown
from loramix.reports.page import page
from loramix.reports.reading import read
from tests import tiny

TENSORS = {"background_D", "center_I", "means_ED", "whiten_ID"}


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("calibrate")
    tiny.save_base(folder / "base")
    settings = {
        "output_dir": str(folder / "run"),
        "model_name_or_path": str(folder / "base"),
        "data": {"domains": tiny.toy_domains(folder / "data", test=20), "max_length": 64},
        "adapter": {"r": 4, "router": {"pooling": "mean"}},
        "training": {"max_steps": 2, "learning_rate": 1e-2},
    }
    (folder / "toy.yaml").write_text(yaml.safe_dump(settings))
    assert loramix(["train", str(folder / "toy.yaml")]) == 0
    return folder


def strange(folder: Path, count: int = 12) -> str:
    """A domain that nobody learns."""
    pick = random.Random(1)
    rows = [{"prompt": "".join(pick.choices("~^|<>{}", k=24)), "completion": "<>"} for _ in range(count)]
    file = folder / "strange.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)) + "\n")
    return str(file)


@pytest.fixture(scope="module")
def calibrated(project: Path) -> tuple[Path, dict[str, Any], Any]:
    """The run, what abstention.json holds, and the adapter as it was before."""
    before = read_adapter(project / "run/model")
    calibrate(project / "run", 0.9, True)
    return project / "run", json.loads((project / "run/abstention.json").read_text()), before


def test_the_adapter_gains_the_calibration_and_nothing_else_changes(calibrated):
    run, content, before = calibrated
    after = read_adapter(run / "model")
    gained = after.tensors.keys() - before.tensors.keys()
    assert {name.rpartition(".")[2] for name in gained} == TENSORS
    assert len({name.rpartition(".")[0] for name in gained}) == 1
    assert all(torch.equal(after.tensors[name], tensor) for name, tensor in before.tensors.items())
    calibration = after.config["abstention"]
    assert {k: v for k, v in after.config.items() if k != "abstention"} == before.config
    assert calibration == {key: content[key] for key in ("kind", "layer", "dims", "threshold", "keep")}
    assert not list(run.glob("model.*")), "nothing half-written is left"


def test_the_figures_are_whole(calibrated):
    _, content, _ = calibrated
    assert set(content["held"]) == set(content["outside"]) == {"adds", "greets", "shouts"}
    kept = sum(one["kept"] * one["prompts"] for one in content["held"].values())
    assert kept / 60 >= 0.9
    assert content["against"] == "left out"
    assert content["mean_auroc"] == pytest.approx(sum(one["auroc"] for one in content["outside"].values()) / 3)
    assert content["mean_auroc"] > 0.9


def test_the_run_opens_and_sends_strangers_to_the_base(calibrated, project: Path, capsys):
    run, content, _ = calibrated
    model, tokenizer = open_model(*reversed(open_run(run)))
    texts = [json.loads(line)["prompt"] for line in Path(strange(project)).read_text().splitlines()]
    routes = model.route(texts, tokenizer)
    assert sum(route.expert == "base" for route in routes) >= len(texts) / 2
    own = model.route(["abcdefghijabcdefghij", "QRSTUVWXYZQRSTUVWXYZ"], tokenizer)
    assert all(route.threshold == content["threshold"] for route in (*routes, *own))
    capsys.readouterr()
    assert loramix(["route", str(run), "-t", texts[0], "--json"]) == 0
    (told,) = json.loads(capsys.readouterr().out)
    assert told["score"] == pytest.approx(routes[0].score, abs=1e-4)
    assert loramix(["route", str(run), "-t", texts[0]]) == 0
    assert "threshold" in capsys.readouterr().out
    assert loramix(["route", str(run), "-t", texts[0], "--no-abstain", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["score"] is None


def test_again_gives_the_same_files(calibrated, capsys):
    run, content, _ = calibrated
    file = run / "model/adapter_model.safetensors"
    before = file.read_bytes()
    calibrate(run, 0.9, False)
    assert "AUROC" in capsys.readouterr().out
    assert file.read_bytes() == before
    assert json.loads((run / "abstention.json").read_text()) == content


def test_the_report_shows_it(calibrated):
    content = read(calibrated[0])
    text, html = markdown(content), page([content])
    assert "When no expert fits" in text
    assert "this is an estimate" in text
    assert "When no expert fits: scores" in html
    assert "without one" in html
    assert "When no expert fits" not in page([{**content, "abstention": None}])


def test_eval_measures_what_it_measured_before(calibrated, capsys):
    run, _, _ = calibrated
    before = json.loads((run / "results.json").read_text())
    assert loramix(["eval", str(run), "--json"]) == 0
    again = json.loads(capsys.readouterr().out)
    rows = {(row["domain"], row["model"]): row["perplexity"] for row in before["rows"]}
    for row in again["rows"]:
        assert row["perplexity"] == pytest.approx(rows[row["domain"], row["model"]], rel=1e-4)
    for decision, values in before["perplexity_by_decision"].items():
        assert again["perplexity_by_decision"][decision] == pytest.approx(values, rel=1e-4)


def test_unseen_domains_are_asked_where_there_are_any(project: Path, capsys):
    run = project / "run"
    config = yaml.safe_load((run / "config.yaml").read_text())
    kept = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(
        yaml.safe_dump({**config, "data": {**config["data"], "unseen": {"signs": strange(project)}}})
    )
    try:
        calibrate(run, 0.9, True)
    finally:
        (run / "config.yaml").write_text(kept)
    content = json.loads(capsys.readouterr().out)
    assert content["against"] == "unseen"
    assert content["outside"]["signs"]["prompts"] == 12
    assert content["outside"]["signs"]["auroc"] > 0.9


def test_what_cannot_be_calibrated_is_refused(project: Path):
    run = project / "run"
    with pytest.raises(ConfigError, match="keep = 95"):
        calibrate(run, 95.0, False)
    config = (run / "config.yaml").read_text()
    try:
        changed = yaml.safe_load(config)
        other = {**changed, "method": "mosld", "adapter": {"r": 4, "num_experts": 3}}
        (run / "config.yaml").write_text(yaml.safe_dump(other, sort_keys=False))
        with pytest.raises(ConfigError, match="settles no expert"):
            calibrate(run, 0.95, False)
        changed["data"]["domains"] = dict(reversed(changed["data"]["domains"].items()))
        (run / "config.yaml").write_text(yaml.safe_dump(changed, sort_keys=False))
        with pytest.raises(DataError, match="restore the data"):
            calibrate(run, 0.95, False)
    finally:
        (run / "config.yaml").write_text(config)
