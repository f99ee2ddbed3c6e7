"""Several processes train as one does; the first alone writes; one that is killed ends all, and the run goes on."""

from __future__ import annotations

import json
import os
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.data_loader import BatchSamplerShard
from safetensors.torch import load_file
from torch.utils.data import BatchSampler

from loramix import processes
from loramix.budget import rows_per_step, steps_for, steps_per_epoch
from loramix.data.mixing import MixtureSampler
from loramix.training.settings import TrainingSettings
from tests import ended
from tests.torture.forks import fork

SOON = 30.0


def _together(count: int, work: Callable[[int], object]) -> list[tuple[int, Callable[[], int]]]:
    """Starts forks that are told of each other as torchrun would tell them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def one(rank: int) -> object:
        told = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
        os.environ.update({name: str(value) for name, value in told.items()})
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), OMP_NUM_THREADS="1", MKL_NUM_THREADS="1")
        torch.set_num_threads(1)
        return work(rank)

    return [fork(lambda rank=rank: one(rank)) for rank in range(count)]


def _content(place: Path, accumulation: int) -> dict[str, Any]:
    few = {"per_device_train_batch_size": 3, "gradient_accumulation_steps": accumulation, "max_steps": 4}
    content = ended.settings(place, "moa", **few, save_steps=1)
    return {**content, "adapter": {}, "controls": ["single_long"]}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("processes")
    ended.settings(folder, "moa")
    return folder


@pytest.fixture(scope="module")
def whole(place: Path) -> Path:
    """What two processes leave."""
    started = _together(2, lambda _: ended.train(_content(place, 1), place / "two"))
    assert [wait() for _, wait in started] == [0, 0]
    return place / "two"


def test_two_processes_leave_what_one_does(whole: Path, place: Path):
    assert fork(lambda: ended.train(_content(place, 2), place / "one"))[1]() == 0
    of_two, of_one = (json.loads((place / name / "results.json").read_text()) for name in ("two", "one"))
    assert [row["model"] for row in of_two["rows"]] == [row["model"] for row in of_one["rows"]]
    for two, one in zip(of_two["rows"], of_one["rows"], strict=True):
        other_rows = two["model"] == "single_long"  # batches of another size are put together from other lengths
        assert two["perplexity"] == pytest.approx(one["perplexity"], rel=1e-2 if other_rows else 1e-5)
    for name, stage in of_one["stages"].items():
        near = 0.05 if name.startswith("longer") else 0.0
        assert of_two["stages"][name]["tokens"] == pytest.approx(stage["tokens"], rel=near), name
        assert of_two["stages"][name]["steps"] == stage["steps"], name
    weights = [load_file(place / name / "model" / "adapter_model.safetensors") for name in ("two", "one")]
    for name, weight in weights[1].items():
        torch.testing.assert_close(weights[0][name], weight, rtol=1e-4, atol=1e-6)
    logs = [(place / name / "log.jsonl").read_text().splitlines() for name in ("two", "one")]
    for two, one in zip(*(map(json.loads, log) for log in logs), strict=True):
        assert two.keys() == one.keys()
        if one["stage"].startswith("longer"):
            continue
        for key in (key for key in one if key.startswith(("loss", "router_accuracy/", "auxiliary/"))):
            assert two[key] == pytest.approx(one[key], rel=1e-4), key


@pytest.mark.parametrize("victim", [0, 1])
def test_a_process_that_is_killed_ends_all_and_the_run_goes_on(victim: int, whole: Path, place: Path):
    content, folder = _content(place, 1), place / f"killed-{victim}"

    def dies(rank: int) -> None:
        def end(call: int) -> None:
            if call == 7 and rank == victim:
                os.kill(os.getpid(), signal.SIGKILL)

        with ended.calls(*ended.STEP, end):
            ended.train(content, folder)

    started = _together(2, dies)
    assert started[victim][1]() == -signal.SIGKILL
    since = time.monotonic()
    assert started[1 - victim][1]() != 0
    assert time.monotonic() - since < SOON
    again = _together(2, lambda _: ended.train(content, folder, resume=True))
    assert [wait() for _, wait in again] == [0, 0]
    assert "going on after step" in folder.with_suffix(".screen").read_text()
    assert ended.left_by(folder) == ended.left_by(whole)


def test_only_one_at_a_time_also_of_several(whole: Path, place: Path):
    """A finished run is as it was after a start that is refused."""
    before = ended.left_by(whole)
    started = _together(2, lambda _: ended.train(_content(place, 1), whole))
    assert started[0][1]() != 0
    os.kill(started[1][0], signal.SIGKILL)  # as torchrun does
    started[1][1]()
    assert ended.left_by(whole) == before


@pytest.mark.parametrize("count", [1, 2, 4])
def test_a_step_has_the_same_rows_in_however_many_processes(count: int):
    sampler = MixtureSampler([40, 24], [0.7, 0.3], [n % 7 + 1 for n in range(64)], batch_size=4, seed=3)
    batches = [list(BatchSamplerShard(BatchSampler(sampler, 4, drop_last=False), count, rank)) for rank in range(count)]
    accumulation = 4 // count
    steps = [
        [row for shard in batches for batch in shard[start : start + accumulation] for row in batch]
        for start in range(0, len(batches[0]), accumulation)
    ]
    order = list(sampler)
    assert [sorted(step) for step in steps] == [sorted(order[start : start + 16]) for start in range(0, 64, 16)]


@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # on a machine with one core
def test_workers_that_load_change_nothing(place: Path):
    for workers in (0, 2):
        content = ended.settings(place, "lora", dataloader_num_workers=workers)
        assert fork(lambda c=content, w=workers: ended.train(c, place / f"workers-{w}"))[1]() == 0
    assert ended.left_by(place / "workers-0") == ended.left_by(place / "workers-2")


def test_budgets_count_all_processes(monkeypatch: pytest.MonkeyPatch):
    two, one = (TrainingSettings(per_device_train_batch_size=2, gradient_accumulation_steps=n) for n in (1, 2))
    wanted = [(rows_per_step(one), steps_per_epoch(one, n), steps_for(n, one, 10)) for n in (8, 20)]
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert (processes.count(), processes.writes()) == (1, True), "without RANK, WORLD_SIZE is somebody else's"
    monkeypatch.setenv("RANK", "1")
    assert (processes.count(), processes.writes()) == (2, False)
    assert [(rows_per_step(two), steps_per_epoch(two, n), steps_for(n, two, 10)) for n in (8, 20)] == wanted
