"""Defects that a review of the lifecycle found, each with what it did to a run."""

from __future__ import annotations

import errno
import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from loramix import run_folder
from loramix.adapters.adapter import read_adapter, write_adapter
from loramix.adapters.lora import setting_problems
from loramix.cli.main import run as loramix
from tests import tiny


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("reviewed")
    tiny.save_base(folder / "base")
    domains = tiny.toy_domains(folder / "data", train=10, test=6)
    more = domains.pop("shouts")
    settings = {
        "output_dir": str(folder / "run"),
        "model_name_or_path": str(folder / "base"),
        "data": {"domains": domains, "unseen": {"shouts": more}, "max_length": 64},
        "adapter": {"r": 4},
        "training": {"max_steps": 2, "learning_rate": 1e-2},
    }
    (folder / "toy.yaml").write_text(yaml.safe_dump(settings))
    assert loramix(["train", str(folder / "toy.yaml")]) == 0
    return folder


@pytest.fixture
def run(original: Path, tmp_path: Path) -> Path:
    shutil.copytree(original / "run", tmp_path / "run")
    config = tmp_path / "run" / "config.yaml"
    config.write_text(config.read_text().replace(str(original / "run"), str(tmp_path / "run")))
    return tmp_path / "run"


def _again(run: Path, *options: str) -> int:
    return loramix(["train", str(run), "--stage", *options])


def test_an_unseen_domain_becomes_a_learned_one_and_first_experts_may_all_leave(original: Path, run: Path):
    assert loramix(["experts", "add", str(run), "shouts", "--data", str(original / "data/shouts")]) == 0
    settings = yaml.safe_load((run / "config.yaml").read_text())
    assert "shouts" in settings["data"]["domains"]
    assert not settings["data"].get("unseen")
    assert loramix(["experts", "add", str(run), "more", "--data", str(original / "data/adds")]) == 0
    probe = ["route", str(run), "--text", "abc", "--json"]
    for name in ("adds", "greets"):
        assert loramix(["experts", "remove", str(run), name]) == 0
        assert loramix(probe) == 0
    results = json.loads((run / "results.json").read_text())
    assert not {row["domain"] for row in results["rows"]} & {"adds", "greets"}


def test_a_name_that_is_unseen_cannot_be_taken_and_nothing_is_changed(run: Path):
    before = {p: p.read_bytes() for p in run.rglob("*") if p.is_file()}
    assert loramix(["experts", "rename", str(run), "adds", "shouts"]) == 2
    assert {p: p.read_bytes() for p in run.rglob("*") if p.is_file()} == before


def test_a_full_disk_leaves_the_run_as_it_was(run: Path, monkeypatch: pytest.MonkeyPatch):
    before = {p: p.read_bytes() for p in run.rglob("*") if p.is_file()}

    def full(_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(run_folder.os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        loramix(["experts", "rename", str(run), "adds", "sums"])
    assert {p: p.read_bytes() for p in run.rglob("*") if p.is_file()} == before


def test_a_rename_reaches_what_was_measured(run: Path):
    (run / "longer" / "adds").mkdir(parents=True)
    assert loramix(["experts", "rename", str(run), "adds", "sums"]) == 0
    text = (run / "results.json").read_text()
    assert '"adds"' not in text
    assert {row["domain"] for row in json.loads(text)["rows"]} >= {"sums", "greets"}
    assert (run / "longer" / "sums").is_dir()


def test_an_export_never_replaces_what_is_not_one(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "manifest.json").write_text('{"files": []}')
    (folder / "precious.txt").write_text("kept")
    assert loramix(["export", str(run), "-o", str(folder)]) == 2
    assert (folder / "precious.txt").read_text() == "kept"
    good = tmp_path / "good"
    assert loramix(["export", str(run), "-o", str(good)]) == 0
    assert loramix(["export", str(run), "-o", str(good)]) == 0  # its own it replaces
    (good / "LICENSE").write_text("mine")
    assert loramix(["export", str(run), "-o", str(good)]) == 2
    empty = tmp_path / "empty"
    empty.mkdir()
    monkeypatch.chdir(empty)
    assert loramix(["export", str(run), "-o", "."]) == 0
    assert (empty / "manifest.json").is_file()
    assert loramix(["experts", "extract", str(run), "adds", "-o", str(folder / "precious.txt")]) == 2


def test_routers_alone_leave_trained_experts_and_calibration(run: Path):
    assert loramix(["calibrate", str(run)]) == 0
    before = read_adapter(run / "model")
    assert _again(run, "routers") == 0
    after = read_adapter(run / "model")
    for name, tensor in before.tensors.items():
        if ".loramix_bank." in name or ".abstention." in name:
            assert torch.equal(after.tensors[name], tensor), name
    assert after.config["abstention"] == before.config["abstention"]
    assert any(not torch.equal(after.tensors[name], t) for name, t in before.tensors.items() if "w_out" in name)


def test_a_stage_that_fails_leaves_the_settings(run: Path, capsys: pytest.CaptureFixture[str]):
    before = (run / "config.yaml").read_text()
    assert _again(run, "routers", "adapter.r=8") == 4
    assert _again(run, "routers", "lora_alpha=64") == 4
    assert "scaling" in capsys.readouterr().err
    assert (run / "config.yaml").read_text() == before
    assert _again(run, "routers") == 0


def test_rows_of_other_data_are_measured_again(run: Path):
    assert _again(run, "routers", "data.max_test_examples=2") == 0
    rows = json.loads((run / "results.json").read_text())["rows"]
    tokens = {(row["domain"], row["model"]): row["tokens"] for row in rows}
    for domain in ("adds", "greets"):
        assert tokens[domain, "single"] == tokens[domain, "moa_oracle"]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_numbers_that_are_none_are_refused(value: float):
    assert setting_problems({"r": 8, "lora_alpha": value})
    assert setting_problems({"r": 8, "lora_alpha": 8, "alpha_pattern": {"q_proj": value}})
    assert setting_problems({"r": 8, "lora_alpha": 8, "megatron_core": "antigravity", "megatron_config": {"a": 1}})


def test_own_experts_that_do_not_fit_their_settings_are_refused(run: Path, tmp_path: Path):
    own = read_adapter(run / "experts" / "adds")
    folder = tmp_path / "own"
    write_adapter(own, folder)
    config = json.loads((folder / "adapter_config.json").read_text())
    other = str(run / "experts" / "greets")
    made = ["experts", "import", f"a={folder}", f"b={other}", "-o", str(tmp_path / "made")]
    for wrong in ({"r": 16}, {"lora_alpha": math.nan}, {"lora_alpha": math.inf}):
        (folder / "adapter_config.json").write_text(json.dumps({**config, **wrong}))
        assert loramix(made) == 4
        assert not (tmp_path / "made" / "model").exists()


def test_a_hub_cache_of_an_export_can_be_imported(run: Path, tmp_path: Path):
    export = tmp_path / "export"
    assert loramix(["export", str(run), "-o", str(export)]) == 0
    repo = tmp_path / "models--me--mix"
    snapshot, blobs = repo / "snapshots" / "abc", repo / "blobs"
    blobs.mkdir(parents=True)
    for number, file in enumerate(p for p in sorted(export.rglob("*")) if p.is_file()):
        blob = blobs / str(number)
        shutil.copy(file, blob)
        link = snapshot / file.relative_to(export)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(blob)
    made = tmp_path / "made"
    assert loramix(["experts", "import", str(snapshot), "-o", str(made), "--any-base-name"]) == 0
    ours, theirs = (load_file(folder / "model" / "adapter_model.safetensors") for folder in (run, made))
    assert all(torch.equal(theirs[name], tensor) for name, tensor in ours.items())
    outside = tmp_path / "other" / "snapshot" / "x"
    outside.mkdir(parents=True)
    for file in (run / "experts" / "adds").iterdir():
        (outside / file.name).symlink_to(blobs / "0")
    assert loramix(["experts", "import", f"a={outside}", f"b={run}/experts/greets", "-o", str(tmp_path / "no")]) == 4


def test_an_export_of_some_layers_in_16_bits_becomes_the_same_run(original: Path, tmp_path: Path):
    part, made = tmp_path / "part", tmp_path / "made"
    options = [f"output_dir={part}", "dtype=bfloat16", "adapter.layers_to_transform=[1,2]", "controls=[]"]
    assert loramix(["train", str(original / "toy.yaml"), *options]) == 0
    assert loramix(["export", str(part), "-o", str(tmp_path / "export")]) == 0
    assert loramix(["experts", "import", str(tmp_path / "export"), "-o", str(made)]) == 0
    settings = yaml.safe_load((made / "config.yaml").read_text())
    assert settings["dtype"] == "bfloat16"
    assert settings["adapter"]["layers_to_transform"] == [1, 2]
    data = [f"data.domains.{name}={original / 'data' / name}" for name in ("adds", "greets")]
    assert _again(made, "routers", *data) == 0


def test_a_rank_above_a_modules_width_is_an_option_at_fault(run: Path, tmp_path: Path, capsys: Any):
    words = ["--weights", "adds=0.5", "--weights", "greets=0.5", "--combination", "ties_svd", "--density", "0.5"]
    assert loramix(["experts", "merge", str(run), *words, "--rank", "20", "-o", str(tmp_path / "merged")]) == 2
    assert "--rank 20" in capsys.readouterr().err
