"""`loramix compare`: what is planned, shared, resumed, and how far results depend on anything but settings and data."""

from __future__ import annotations

import json
import multiprocessing
import os
import queue
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
import yaml
from rich.console import Console

from loramix.cli.main import run as verb
from loramix.comparison.compare import Compared, compare, dry_run
from loramix.comparison.launch import Processes
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
    # Stage 1: 3 domains x 8 rows; stage 2: 24 rows. Together 48 rows, in steps of 4.
    assert steps["molora"]["max_steps"] == 12
    assert steps["lora"]["max_steps"] == 12


def test_short_last_batches_are_not_counted_as_full(tmp_path: Path):
    cells, _ = dry_run(built(tmp_path, "data.max_train_examples=3", "per_device_train_batch_size=2"))
    lora = next(cell for cell in cells.values() if cell.kind == "method" and cell.experiment.method == "lora")
    # Stage 1: 3 x 3 rows (2 steps each, 6 in all), stage 2: 9 rows. Together 18, and an epoch of 9 rows takes 5 steps.
    assert lora.experiment.training["max_steps"] == 10


def test_the_longest_second_stage_sets_the_length(tmp_path: Path):
    cells, _ = dry_run(
        built(tmp_path, "methods.moa.joint_stage.num_train_epochs=3", "methods.molora.settings=[single]")
    )
    by_method = {cell.experiment.method: cell for cell in cells.values() if cell.kind == "method"}
    assert by_method["lora"].experiment.training["max_steps"] == (24 + 3 * 24) // 4
    assert by_method["molora"].experiment.training["max_steps"] == (8 + 3 * 8) // 4
    alone = next(cell for cell in cells.values() if cell.kind == "longer")
    assert alone.experiment.training["max_steps"] == 18


def test_a_row_s_own_stages_win(tmp_path: Path):
    comparison = built(
        tmp_path,
        "joint_stage={learning_rate: 5e-4, num_train_epochs: 2}",
        methods={"moa": {"learning_rate": 1e-6}, "molora": {"joint_stage": {"learning_rate": 1e-5}}},
    )
    moa = next(row for row in comparison.rows if row.label == "moa")
    assert [stage["learning_rate"] for stage in moa.stages] == [1e-6, 1e-6]
    assert moa.experiment.joint_stage["num_train_epochs"] == 2
    cells, _ = dry_run(comparison)
    molora = next(cell for cell in cells.values() if cell.experiment.method == "molora")
    assert molora.experiment.training["learning_rate"] == 1e-5


@pytest.mark.parametrize(
    "wrong",
    [
        {"lora": {"joint_stage": {"learning_rate": 1e-3}}},
        {"molora": {"expert_stage": {"learning_rate": 1e-3}}},
        {"lora": {"seed": 3}},
    ],
)
def test_what_a_row_cannot_use_is_refused(wrong: dict[str, Any], tmp_path: Path):
    with pytest.raises(ConfigError, match=r"methods|joint_stage|expert_stage|seed"):
        built(tmp_path, methods=wrong)


def test_rows_of_a_file_can_be_picked(tmp_path: Path):
    comparison = built(tmp_path, "methods=[mosl3, lora]", methods={"lora": None, "mosl3": {"method": "mosl", "r": 3}})
    assert [(row.label, row.experiment.adapter.r) for row in comparison.rows] == [("mosl3", 3), ("lora", 2)]


def test_every_method_goes_through_a_cell(tmp_path: Path):
    """All methods one after the other on one base; whatever one leaves behind would show in the next."""
    from loramix.methods import METHODS

    methods: dict[str, Any] = {name: {"settings": ["mixture"]} for name in METHODS}
    methods["moelora-task"]["adapter"] = {"r": 8}
    methods["base"] = None
    changed = content(tmp_path, methods=methods)
    methods["lorahub"]["search"] = {"budget": 2, "examples_per_domain": 1}
    changed["training"] |= {"max_steps": 1}
    done = compare(build_comparison(changed).comparison, SILENT)
    assert done.failed == []
    for one in done.results["rows"]:
        assert one["scores"]["perplexity"]["average"] is not None, one["id"]
    base = row(done.results, "base")["scores"]["perplexity"]["average"]["mean"]
    alone = run(tmp_path, "methods=[base]", f"cells={tmp_path / 'other'}")
    assert row(alone.results, "base")["scores"]["perplexity"]["average"]["mean"] == base


def test_kinds_of_data_are_in_the_key(tmp_path: Path):
    names = {"methods": {"loramoe": {"settings": ["single"]}}}
    three, _ = dry_run(built(tmp_path, **names))
    changed = content(tmp_path, **names)
    changed["data"]["domains"] = {name: changed["data"]["domains"][name] for name in ("adds", "greets")}
    two, _ = dry_run(build_comparison(changed).comparison)
    greets = [next(name for name in cells if "greets" in name) for cells in (three, two)]
    assert greets[0] != greets[1], "the second of two domains is of the second kind, the second of three of the first"


def test_rows_that_are_measured_on_other_rows_are_not_mixed_up(tmp_path: Path):
    methods = {
        "lora": {"settings": ["single"]},
        "few": {"method": "lora", "settings": ["single"], "data": {"max_test_examples": 1}},
    }
    done = run(tmp_path, "against=lora/single", methods=methods)
    whole, few = (row(done.results, name)["scores"]["perplexity"] for name in ("lora/single", "few/single"))
    assert whole["by_domain"]["adds"]["mean"] != few["by_domain"]["adds"]["mean"]
    assert done.results["paired"] == [], "they have no test rows in common"


def test_the_reference_is_the_lora_and_not_what_ends_like_it(tmp_path: Path):
    done = run(tmp_path, methods={"molora": None, "lora": {"settings": ["mixture"]}, "base": None})
    assert {one["against"] for one in done.results["paired"]} == {"lora/mixture"}


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
    with pytest.raises(ConfigError, match="a comparison trains each expert by itself"):
        built(tmp_path, "experts_together=true")
    with pytest.raises(ConfigError, match="a comparison trains each expert by itself"):
        built(tmp_path, "methods.moa.experts_together=true")


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


@pytest.mark.parametrize(("told", "each"), [(None, 4), ("2", None)])
def test_workers_share_the_threads_unless_told(told: str | None, each: int | None, monkeypatch: pytest.MonkeyPatch):
    """Eight threads and two workers: four each, or what the environment, which they inherit, says."""
    started: list[int | None] = []

    def process(*, args: tuple[Any, ...], **_: Any) -> Any:
        started.append(args[1])
        return SimpleNamespace(start=lambda: None)

    context = SimpleNamespace(Queue=queue.Queue, Process=process)
    monkeypatch.setattr(multiprocessing, "get_context", lambda _: context)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if told:
        monkeypatch.setenv("OMP_NUM_THREADS", told)
    Processes(cast("Any", None), 2)
    assert started == [each, each]


@pytest.mark.parametrize("launcher", ["processes", "ray"])
def test_several_workers_give_the_same_results(launcher: str, tmp_path: Path, finished: tuple[Path, Compared]):
    _, whole = finished
    if launcher == "ray":
        pytest.importorskip("ray")
    arguments = ["--jobs", "2", *(["--launcher", "ray"] if launcher == "ray" else [])]
    process = _process(tmp_path, *arguments)
    try:
        assert process.wait(timeout=900) == 0
    finally:
        process.kill()
        process.wait()
    results = json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert _without_paths(timeless(results)) == _without_paths(timeless(whole.results))


def test_one_comparison_at_a_time_in_a_folder(tmp_path: Path):
    from filelock import FileLock

    comparison = built(tmp_path)
    (tmp_path / "out").mkdir()
    with FileLock(tmp_path / "out" / ".lock"), pytest.raises(ConfigError, match="another comparison"):
        compare(comparison, SILENT)


def test_dry_run_lists_the_cells_and_trains_nothing(
    finished: tuple[Path, Compared], capsys: pytest.CaptureFixture[str]
):
    folder, _ = finished
    config = folder / "dry.yaml"
    config.write_text(yaml.safe_dump(content(folder)))
    assert verb(["compare", str(config), "methods.mosl.r=3", "--dry-run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines if "mosl" in line] == [["to", "run"]]
    assert lines[-1] == "12 cells, 11 finished"


def test_a_wrong_launcher_is_refused(finished: tuple[Path, Compared], capsys: pytest.CaptureFixture[str]):
    folder, _ = finished
    assert verb(["compare", str(folder / "dry.yaml"), "--launcher", "slurm"]) == 2
    assert "expected local or ray" in capsys.readouterr().err
