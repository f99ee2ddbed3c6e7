"""`loramix compare`: what is planned, shared, resumed, and how far results depend on anything but settings and data."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console

from loramix.comparison.compare import Compared, compare, dry_run
from loramix.comparison.settings import Comparison, build_comparison
from loramix.errors import ConfigError
from tests import tiny

SILENT = Console(quiet=True)
TIMES = ("train_seconds", "measure_seconds", "peak_memory_mb")


def content(folder: Path, **changed: Any) -> dict[str, Any]:
    base = folder / "base"
    if not base.exists():
        tiny.save_base(base)
    domains = {name: str(folder / "data" / name) for name in ("adds", "greets", "shouts")}
    if not (folder / "data").exists():
        domains = tiny.toy_domains(folder / "data", train=8, test=4)
    return {
        "output_dir": str(folder / "out"),
        "model_name_or_path": str(base),
        "methods": {"base": None, "lora": None, "lora-long": None, "moa": None, "moe-lora": None, "molora": None},
        "data": {"domains": domains, "max_length": 64},
        "adapter": {"r": 2, "lora_alpha": 4},
        "training": {"num_train_epochs": 1, "per_device_train_batch_size": 4, "logging_steps": 1},
        "measure": {"resamples": 100},
        **changed,
    }


def built(folder: Path, *overrides: str, **changed: Any) -> Comparison:
    return build_comparison(content(folder, **changed), overrides).comparison


def run(folder: Path, *overrides: str, **changed: Any) -> Compared:
    return compare(built(folder, *overrides, **changed), SILENT)


def timeless(results: dict[str, Any]) -> str:
    """Returns the results as text without what a clock or the system's memory decides."""
    kept = json.loads(json.dumps(results))
    for row in kept["rows"]:
        for name in TIMES:
            row["cost"].pop(name)
    return json.dumps(kept)


def row(results: dict[str, Any], name: str) -> dict[str, Any]:
    return next(one for one in results["rows"] if one["id"] == name)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Compared]:
    folder = tmp_path_factory.mktemp("finished")
    return folder, run(folder)


def test_every_row_is_measured_on_every_domain(finished: tuple[Path, Compared]):
    _, done = finished
    assert done.failed == []
    wanted = ["base", "lora/single", "lora/mixture", "lora-long/single", "moa/mixture", "moa/mixture/oracle"]
    wanted += ["moe-lora/mixture", "moe-lora/mixture/extracted", "molora/mixture"]
    assert [one["id"] for one in done.results["rows"]] == wanted
    for one in done.results["rows"]:
        scores = one["scores"]["perplexity"]
        assert list(scores["by_domain"]) == ["adds", "greets", "shouts"]
        for domain in scores["by_domain"].values():
            assert domain["low"] <= domain["mean"] <= domain["high"]
        means = [domain["mean"] for domain in scores["by_domain"].values()]
        assert scores["average"]["mean"] == pytest.approx(sum(means) / 3)


def test_rows_share_the_experts_of_stage_one(finished: tuple[Path, Compared]):
    folder, _ = finished
    cells = [path.name for path in (folder / "out" / "cells" / "base").iterdir()]
    assert sum(name.startswith("expert-") for name in cells) == 3  # lora/single, lora-long, moa and moe-lora use them
    assert len(cells) == 1 + 3 + 1 + 3 + 1 + 1 + 1


def test_the_same_again_runs_nothing_and_gives_the_same_bytes(finished: tuple[Path, Compared]):
    folder, done = finished
    before = (folder / "out" / "comparison.json").read_bytes()
    files = {path: path.stat().st_mtime_ns for path in (folder / "out" / "cells").rglob("*") if path.is_file()}
    again = run(folder)
    assert (folder / "out" / "comparison.json").read_bytes() == before
    assert json.dumps(again.results) == json.dumps(done.results)
    assert {path: path.stat().st_mtime_ns for path in files} == files


def test_only_what_changed_runs_again(finished: tuple[Path, Compared]):
    folder, _ = finished
    cells, done = dry_run(built(folder, "methods.molora.adapter.r=4"))
    assert [cell.experiment.method for name, cell in cells.items() if name not in done] == ["molora"]
    cells, done = dry_run(built(folder, "expert_stage.learning_rate=1e-3", "methods.molora.learning_rate=3e-4"))
    left = {name for name in cells if name not in done}
    # Experts are new, and so is all that starts from them or trains as long with their settings.
    assert {cells[name].kind for name in left} == {"expert", "longer", "method"}
    cells, done = dry_run(built(folder, "measure.text=[bleu]"))
    assert not done, "another measurement is missing everywhere"


def test_rows_learn_as_many_examples_as_both_stages(finished: tuple[Path, Compared]):
    folder, _ = finished
    cells, _ = dry_run(built(folder, "joint_stage.per_device_train_batch_size=6"))
    steps = {cell.experiment.method: cell.experiment.training for cell in cells.values() if cell.kind == "method"}
    # Stage 1: 3 domains x 2 steps of 4 rows; stage 2: 24 rows in 4 steps of 6. Together 48 rows, in steps of 4.
    assert steps["molora"]["max_steps"] == 12
    assert steps["lora"]["max_steps"] == 12


def test_two_seeds_share_the_test_rows(tmp_path: Path):
    done = run(tmp_path, "seeds=[0,1]", "methods={base: null, lora: {settings: [mixture]}}")
    scores = row(done.results, "lora/mixture")["scores"]["perplexity"]["by_domain"]["adds"]
    assert len(scores["by_seed"]) == 2
    assert scores["by_seed"][0] != scores["by_seed"][1]
    assert scores["std"] > 0
    base = row(done.results, "base")["scores"]["perplexity"]["by_domain"]["adds"]
    assert base["by_seed"][0] == base["by_seed"][1]


def test_a_failed_cell_is_told_and_the_others_go_on(tmp_path: Path):
    done = run(tmp_path, "methods={base: null, lora: {learning_rate: 1e30, settings: [mixture]}, molora: null}")
    assert [outcome.cell.startswith("base/lora-s0") for outcome in done.failed] == [True]
    assert "diverged" in str(done.failed[0].problem)
    assert row(done.results, "molora/mixture")["scores"]
    assert row(done.results, "lora/mixture")["scores"] == {}


def test_unseen_domains_are_measured_and_left_out_of_the_average(tmp_path: Path):
    changed = content(tmp_path)
    unseen = changed["data"]["domains"].pop("shouts")
    changed["data"]["unseen"] = {"shouts": unseen}
    changed["methods"] = {"base": None, "lora": {"settings": ["mixture"]}, "moa": None}
    done = compare(build_comparison(changed).comparison, SILENT)
    assert done.results["unseen"] == ["shouts"]
    for name in ("base", "lora/mixture", "moa/mixture"):
        scores = row(done.results, name)["scores"]["perplexity"]
        assert set(scores["by_domain"]) == {"adds", "greets", "shouts"}
        seen = [scores["by_domain"][d]["mean"] for d in ("adds", "greets")]
        assert scores["average"]["mean"] == pytest.approx(sum(seen) / 2)


def test_all_problems_of_all_rows_are_told_at_once(tmp_path: Path):
    with pytest.raises(ConfigError) as error:
        built(
            tmp_path,
            "learning_rate=-1",
            "methods={moa: {settings: [single]}, lora: {adapter: {r: 0}}, mosl_d: null, base: null}",
            "against=mosld/mixture",
        )
    said = str(error.value)
    assert "learning_rate = -1" in said
    assert said.count("learning_rate = -1") == 1
    assert "methods.moa: settings" in said
    assert "methods.lora: " in said
    assert 'Did you mean "mosld"' in said


def test_keys_of_a_run_are_refused_with_what_to_use(tmp_path: Path):
    with pytest.raises(ConfigError, match="controls: a comparison has none"):
        built(tmp_path, "controls=[base]", "seed=3")


def _process(folder: Path, *arguments: str) -> subprocess.Popen[bytes]:
    config = folder / "compare.yaml"
    config.write_text(yaml.safe_dump(content(folder)))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-W", "ignore", "-m", "loramix", "compare", str(config), *arguments]
    return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def test_killed_anywhere_it_ends_with_the_same_results(tmp_path: Path, finished: tuple[Path, Compared]):
    """SIGKILL as soon as the first, the fourth and the seventh cell show; then to the end."""
    _, whole = finished
    cells = tmp_path / "out" / "cells" / "base"
    for wanted in (1, 4, 7):
        process = _process(tmp_path)
        deadline = time.monotonic() + 120
        while process.poll() is None and time.monotonic() < deadline:
            if cells.exists() and len(list(cells.iterdir())) >= wanted:
                process.send_signal(signal.SIGKILL)
                break
            time.sleep(0.02)
        process.wait(timeout=60)
    assert not (tmp_path / "out" / "comparison.json").exists()
    done = run(tmp_path)
    assert done.failed == []
    assert _without_paths(timeless(done.results)) == _without_paths(timeless(whole.results))


def _without_paths(text: str) -> str:
    kept = json.loads(text)
    kept["config"] = None  # names the folders
    kept["environment"] = None
    for one in kept["overlap"]:
        one["examples"] = len(one["examples"])
    return json.dumps(kept)


@pytest.mark.parametrize("launcher", ["processes", "ray"])
def test_several_workers_give_the_same_results(launcher: str, tmp_path: Path, finished: tuple[Path, Compared]):
    _, whole = finished
    if launcher == "ray":
        pytest.importorskip("ray")
    arguments = ["--jobs", "2", *(["--launcher", "ray"] if launcher == "ray" else [])]
    assert _process(tmp_path, *arguments).wait(timeout=300) == 0
    results = json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert _without_paths(timeless(results)) == _without_paths(timeless(whole.results))


def test_one_comparison_at_a_time_in_a_folder(tmp_path: Path):
    from filelock import FileLock

    comparison = built(tmp_path)
    (tmp_path / "out").mkdir()
    with FileLock(tmp_path / "out" / ".lock"), pytest.raises(ConfigError, match="another comparison"):
        compare(comparison, SILENT)
