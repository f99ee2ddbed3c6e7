"""The vLLM engine against a stand-in for vLLM: how it is started, what it is asked, what comes back, and how it ends.
The real one: `make vllm-check`."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from loramix.errors import ConfigError, ModelError
from loramix.serving.ask import Ask, EngineError
from loramix.serving.first_layers import earliest_layer, keep_first_layers
from loramix.serving.vllm_engine import VllmEngine
from loramix.serving.vllm_process import VllmOptions, VllmProcess
from tests import serving_case, tiny
from tests.serving_case import GREEDY, ask_for, served
from tests.test_abstention import calibrated

FAKE = Path(__file__).parent / "fake_vllm.py"


@pytest.fixture
def command(tmp_path: Path, monkeypatch) -> str:
    monkeypatch.setenv("FAKE_VLLM_NOTES", str(tmp_path / "notes"))
    file = tmp_path / "vllm"
    file.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{FAKE}" "$@"\n')
    file.chmod(0o755)
    return str(file)


def _process(command: str, tmp_path: Path, **more: Any) -> VllmProcess:
    options = VllmOptions(command, tmp_path / "logs" / "vllm.log", ("--max-model-len", "128"), **more)
    return VllmProcess("base-folder", tmp_path, tiny.EXPERTS, rank=12, places=4, dtype="float32", options=options)


def _run(process: VllmProcess, work: Any, model: Any = None, **settings: Any) -> Any:
    async def run() -> Any:
        engine = VllmEngine(served() if model is None else model, process, **{"places": 4, "queue": 4, **settings})
        await engine.start()
        try:
            return await work(engine)
        finally:
            await engine.stop()
            assert not engine.alive

    return asyncio.run(run())


def _notes(tmp_path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (tmp_path / "notes").read_text().splitlines()]


def test_requests_go_to_the_routed_expert_and_their_stream_comes_back(command: str, tmp_path: Path):
    model, process = served(), _process(command, tmp_path)
    asks = [Ask((5, 6, number), replace(GREEDY, max_tokens=4, stop=("zz",), logprobs=2)) for number in range(7, 15)]
    asks += [Ask((5, 6), replace(GREEDY, max_tokens=3), "blue", answers=2), Ask((5,), GREEDY, "base")]

    async def work(engine: VllmEngine) -> Any:
        return [await ask_for(engine, ask) for ask in asks]

    found = _run(process, work, model)
    started, *asked = _notes(tmp_path)
    arguments = started["arguments"]
    assert arguments[:2] == ["serve", "base-folder"]
    assert arguments[arguments.index("--max-loras") + 1] == "4"  # one slot stays empty
    assert arguments[arguments.index("--max-lora-rank") + 1] == "16"
    assert arguments[-2:] == ["--max-model-len", "128"]
    loras = [json.loads(one) for one in arguments[arguments.index("--lora-modules") + 1 : -2]]
    assert [Path(one["path"]).name for one in loras] == tiny.EXPERTS
    assert len({one["key"] for one in asked}) == 1
    names = dict(zip(tiny.EXPERTS, ("expert-0", "expert-1", "expert-2"), strict=True)) | {"base": "base"}
    for ask, got, body in zip(asks, found, asked, strict=True):
        route = model.settle([ask])[0].routed
        assert got.routed == route
        assert body["model"] == names[route.expert or ""]
        assert body["prompt"] == list(ask.prompt_ids)
        assert got.texts[0] == "".join(map(chr, got.tokens[0]))
        assert [len(tokens) for tokens in got.tokens] == [ask.sampling.max_tokens] * ask.answers
        assert got.reasons == ["length"] * ask.answers
    assert asked[0]["stop"] == ["zz"]
    assert asked[8]["n"] == 2


def test_what_vllm_refuses_or_breaks_off_is_said(command: str, tmp_path: Path):
    async def work(engine: VllmEngine) -> None:
        with pytest.raises(EngineError, match="refused the request: refused") as told:
            await ask_for(engine, Ask((63,), GREEDY, "red"))
        assert told.value.status == 400
        with pytest.raises(EngineError) as told:
            await ask_for(engine, Ask((62,), GREEDY, "red"))
        assert told.value.status in (502, 503)
        full = [asyncio.create_task(ask_for(engine, Ask((5,), GREEDY, "red"))) for _ in range(20)]
        done = await asyncio.gather(*full, return_exceptions=True)
        assert {one.status for one in done if isinstance(one, EngineError)} == {429}
        assert engine.queue == (0, 0)

    _run(_process(command, tmp_path), work)


def test_a_vllm_that_does_not_start_is_told_with_its_log(command: str, tmp_path: Path, monkeypatch):
    monkeypatch.setenv("FAKE_VLLM_FAILS", "1")
    with pytest.raises(ModelError, match="no such GPU"):
        asyncio.run(_process(command, tmp_path).start())
    with pytest.raises(ConfigError, match="cannot be started"):
        asyncio.run(_process(str(tmp_path / "nothing"), tmp_path).start())


def test_vllm_ends_with_the_engine(command: str, tmp_path: Path):
    process = _process(command, tmp_path)

    async def work(engine: VllmEngine) -> int:
        assert process._process is not None
        return process._process.pid

    pid = _run(process, work)
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_methods_that_choose_by_token_are_refused(command: str, tmp_path: Path):
    with pytest.raises(ConfigError, match="token by token"):
        VllmEngine(served("mola", allocation="24"), _process(command, tmp_path), places=2, queue=2)


def test_the_earliest_layer_that_is_as_good_as_the_best():
    assert earliest_layer({}) is None
    found = {"layers.0": 0.5, "layers.1": 0.9985, "layers.2": 0.9991, "layers.3": 1.0, "layers.4": 0.9}
    assert earliest_layer(found) == "layer:2"
    assert earliest_layer({"h.0": 1.0, "h.1": 1.0}) == "layer:0"


def test_layers_that_no_router_needs_are_dropped_and_the_routing_stays():
    prompts = [Ask((5, 6, 7 + number), GREEDY) for number in range(12)]
    whole, cut = served(decision="layer:1"), served(decision="layer:1")
    before = sum(parameter.numel() for parameter in cut.model.parameters())
    assert keep_first_layers(cut.model, "layer:1") == 2
    assert sum(parameter.numel() for parameter in cut.model.parameters()) < before
    for one, other in zip(whole.settle(prompts), cut.settle(prompts), strict=True):
        assert one.routed == other.routed
    assert len({one.routed.expert for one in whole.settle(prompts)}) > 1
    with pytest.raises(ConfigError, match="read the running model"):
        keep_first_layers(serving_case.mixture(router={"reads": "experts"}), "layer:1")


def test_layers_that_the_calibration_reads_stay():
    model, _ = calibrated()
    assert model.peft_config["default"].abstention["layer"] == "layers.2"
    assert keep_first_layers(model, "layer:0") == 3
    ids = torch.tensor([[5, 6, 7]])
    assert model.route(input_ids=ids, decision="layer:0")[0].score is not None
