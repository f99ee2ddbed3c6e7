"""The fastest backend is measured once for a device and a shape, kept, and measured by nobody else's rules."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from loramix.experts.apply import concat, grouped
from loramix.experts.faster import Shape, fastest
from loramix.routing import Routing

SHAPE = Shape("cpu", "torch.float32", (32, 8, 16), (32, 16, 8), 2)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("LORAMIX_CACHE", str(tmp_path))
    fastest.cache_clear()
    yield
    fastest.cache_clear()


def _slow(*args: Tensor | Routing | float) -> Tensor:
    time.sleep(0.02)
    return concat(*args)


def test_the_faster_one_is_found_and_kept(tmp_path: Path):
    assert fastest(SHAPE, (("concat", concat), ("slow", _slow))) == "concat"
    assert fastest(SHAPE, (("slow", _slow), ("grouped", grouped))) == "grouped"
    kept = [json.loads(file.read_text()) for file in tmp_path.glob("backends/*/seconds.json")]
    assert {tuple(one["seconds"]) for one in kept} == {("concat", "slow"), ("slow", "grouped")}
    assert all(one["of"]["torch"] == torch.__version__ and one["of"]["device"] == "cpu" for one in kept)
    assert all(one["seconds"]["slow"] >= 0.02 for one in kept)


def test_what_was_kept_is_not_measured_again(tmp_path: Path):
    calls: list[int] = []

    def counted(*args: Tensor | Routing | float) -> Tensor:
        calls.append(1)
        return concat(*args)

    among = (("concat", counted), ("slow", _slow))
    fastest(SHAPE, among)
    measured = len(calls)
    fastest.cache_clear()  # as another process, later
    assert fastest(SHAPE, among) == "concat"
    assert len(calls) == measured > 1
    (file,) = tmp_path.glob("backends/*/seconds.json")
    content = json.loads(file.read_text())
    content["seconds"] = {"concat": 2.0, "slow": 1.0}
    text = json.dumps(content, indent=1)
    file.write_text(text)
    (file.parent / "COMPLETE.json").write_text(json.dumps({"seconds.json": len(text)}))
    fastest.cache_clear()
    assert fastest(SHAPE, among) == "slow", "what is kept decides"


def test_measuring_leaves_the_forward_around_it_alone():
    before = torch.get_rng_state()
    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        assert fastest(SHAPE, (("concat", concat), ("grouped", grouped))) in ("concat", "grouped")
    assert counter.get_total_flops() == 0
    assert torch.equal(torch.get_rng_state(), before)


def test_where_nothing_can_be_kept_nothing_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LORAMIX_CACHE", str(tmp_path / "file"))
    assert fastest(SHAPE, (("concat", concat), ("grouped", grouped))) is None
