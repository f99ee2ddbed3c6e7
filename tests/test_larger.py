"""Larger machines: two processes with a base in parts (FSDP2) are one; bf16, quantised bases, torch.compile."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import get_peft_model
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor

import loramix
from loramix.experiment import build, load
from loramix.models import load_base
from loramix.training.keeper import StageKeeper
from loramix.training.trainer import MixtureTrainer
from tests import ended, tiny
from tests import method_cases as cases
from tests.test_processes import _together
from tests.torture.forks import fork

ROOT = Path(__file__).parent.parent
RECIPES = sorted((ROOT / "recipes" / "larger").glob("*.yaml"))
PAGE = ROOT / "docs" / "larger-machines.md"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("larger")
    ended.settings(folder, "moa")
    return folder


def _content(place: Path, method: str, accumulation: int, **top: Any) -> dict[str, Any]:
    few = {"per_device_train_batch_size": 3, "gradient_accumulation_steps": accumulation, "max_steps": 3}
    content = ended.settings(place, method, **few, save_steps=1) | {"controls": ["base"], **top}
    still = {} if method in ("lora", "moa") else {"bank": {"weight_dropout": 0.0}}  # dropout differs by process
    return {**content, "adapter": {"lora_dropout": 0.0, **(still if method == "mosld" else {})}}


def _in_parts(content: dict[str, Any], folder: Path, resume: bool = False) -> None:
    """Trains, and sees to it that the base was in parts and the head's loss came without logits."""
    true = MixtureTrainer.training_step

    def seen(self: MixtureTrainer, *args: Any, **kwargs: Any) -> Any:
        in_parts = [name for name, p in self.model.named_parameters() if isinstance(p.data, DTensor)]
        assert {name for name, p in self.model.named_parameters() if not p.requires_grad} >= set(in_parts)
        adapted = {name for name, _ in self.model.named_parameters() if ".base_layer." in name}
        assert adapted
        assert adapted <= set(in_parts)
        assert self.language_loss._head is not None
        return true(self, *args, **kwargs)

    MixtureTrainer.training_step = seen
    ended.train({**content, "fsdp": True}, folder, resume=resume)


def _logged(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def _same(two: Path, one: Path) -> None:
    results = [json.loads((folder / "results.json").read_text()) for folder in (two, one)]
    assert [row["model"] for row in results[0]["rows"]] == [row["model"] for row in results[1]["rows"]]
    for got, wanted in zip(results[0]["rows"], results[1]["rows"], strict=True):
        assert got["perplexity"] == pytest.approx(wanted["perplexity"], rel=1e-5)
    compared = 0
    for got, wanted in zip(_logged(two), _logged(one), strict=True):
        assert got.keys() == wanted.keys()
        for key in (key for key in wanted if key.startswith(("loss", "router_accuracy/", "auxiliary/"))):
            assert got[key] == pytest.approx(wanted[key], abs=1e-5), key
            compared += 1
    assert compared
    weights = [load_file(folder / "model" / "adapter_model.safetensors") for folder in (two, one)]
    assert weights[0].keys() == weights[1].keys()
    for name, weight in weights[1].items():
        torch.testing.assert_close(weights[0][name], weight, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("method", ["lora", "moa", "mosld", "mola"])
def test_a_base_in_parts_learns_what_a_whole_one_does(method: str, place: Path):
    started = _together(2, lambda _: _in_parts(_content(place, method, 1), place / f"{method}-parts"))
    assert [wait() for _, wait in started] == [0, 0]
    assert fork(lambda: ended.train(_content(place, method, 2), place / f"{method}-whole"))[1]() == 0
    _same(place / f"{method}-parts", place / f"{method}-whole")


def test_a_run_with_a_base_in_parts_goes_on(place: Path):
    """Killed behind its second checkpoint of the last stage; bitwise what it would have been."""
    content, folder, whole = _content(place, "mola", 1), place / "killed", place / "not-killed"

    def dies(rank: int) -> None:
        def end(call: int) -> None:
            if call == 3 and rank == 0:
                os.kill(os.getpid(), signal.SIGKILL)

        with ended.calls(StageKeeper, "save", end):
            _in_parts(content, folder)

    started = _together(2, dies)
    assert started[0][1]() == -signal.SIGKILL
    assert started[1][1]() != 0
    for one, resume in ((folder, True), (whole, False)):
        again = _together(2, lambda _, one=one, resume=resume: _in_parts(content, one, resume))
        assert [wait() for _, wait in again] == [0, 0]
    assert "going on after step 2" in folder.with_suffix(".screen").read_text()
    assert ended.left_by(folder) == ended.left_by(whole)


@pytest.mark.parametrize(
    ("method", "given", "said"),
    [
        ("full", {"fsdp": True}, "fsdp: method full trains the base itself"),
        ("full", {"load_in_8bit": True}, "load_in_8bit: method full trains the base itself"),
        ("lora", {"fsdp": True, "load_in_4bit": True}, "a quantised base cannot be dealt out"),
        ("lora", {"load_in_8bit": True, "load_in_4bit": True}, "Leave one out"),
        ("lora", {"dp_replicate_size": 2}, "no effect without fsdp"),
        ("moa", {"torch_compile": True}, "joint_stage: torch_compile"),
    ],
)
def test_what_does_not_go_together_is_said(method: str, given: dict[str, Any], said: str, place: Path):
    content = ended.settings(place, method, **{k: v for k, v in given.items() if k == "torch_compile"})
    top = {k: v for k, v in given.items() if k != "torch_compile"}
    with pytest.raises(loramix.ConfigError, match=said):
        build({**content, **top, "output_dir": str(place / "never")})


def test_a_quantised_base_without_bitsandbytes_says_what_to_install(place: Path):
    if importlib.util.find_spec("bitsandbytes"):
        pytest.skip("bitsandbytes is installed")
    with pytest.raises(loramix.ModelError, match=r"load_in_4bit: bitsandbytes is not installed.*loramix\[quant\]"):
        load_base(str(place / "base"), load_in_4bit=True)


def test_groups_that_cannot_be_made_and_another_fsdp_are_refused(place: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "8")
    with pytest.raises(loramix.ModelError, match="8 processes cannot be dealt into 3 groups"):
        load_base(str(place / "base"), fsdp=True, dp_replicate_size=3)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(loramix.ConfigError, match="accelerate was told to use FSDP"):
        load_base(str(place / "base"))


def test_alone_there_is_nothing_to_deal_out(place: Path):
    assert not any(isinstance(p.data, DTensor) for p in load_base(str(place / "base"), fsdp=True).parameters())


def test_bf16_learns_nearly_the_same(place: Path):
    method = "mola"
    for name, given, top in (
        ("fp32", {}, {}),
        ("autocast", {"bf16": True}, {}),
        ("all", {"bf16": True}, {"dtype": "bfloat16"}),
    ):
        content = ended.settings(place, method, max_steps=2, logging_steps=1, **given)
        work = {**content, **top, "controls": [], "adapter": {"lora_dropout": 0.0}}
        assert fork(lambda w=work, n=name: ended.train(w, place / f"{method}-{n}"))[1]() == 0
    plain = _logged(place / f"{method}-fp32")
    for name in ("autocast", "all"):
        losses = [
            (got["loss"], wanted["loss"])
            for got, wanted in zip(_logged(place / f"{method}-{name}"), plain, strict=True)
            if "loss" in wanted
        ]
        assert all(got == pytest.approx(wanted, rel=2e-3) for got, wanted in losses)
        assert any(got != wanted for got, wanted in losses), "nothing was rounded, so nothing is shown"
        weights = load_file(place / f"{method}-{name}" / "model" / "adapter_model.safetensors")
        assert {weight.dtype for weight in weights.values()} == {torch.float32}


@pytest.mark.parametrize("method", ["mola", "moa"])
def test_routers_score_in_fp32_under_autocast(method: str):
    model = tiny.moa() if method == "moa" else cases.build(method, tiny.llama(layers=2))
    ids, found = tiny.ids(2, 7), []
    for on in (False, True):
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=on):
            model.eval()(input_ids=ids)
        found.append(next(iter(model.routings.values())).logits)
    assert found[0].dtype == found[1].dtype == torch.float32
    assert torch.equal(*found), "the first router reads the same states, so its scores are the same"


@pytest.mark.parametrize("method", ["lora", "mola", "mosld"])
def test_a_decoder_layer_compiles_without_a_break(method: str):
    """As one graph with the routers in it, and gives the same loss."""
    ids, losses = tiny.ids(2, 7), []
    for compiled in (False, True):
        model = cases.build(method, tiny.llama(layers=2)).train() if method != "lora" else _lora()
        if compiled:
            model.get_base_model().model.layers[0].compile(backend="eager", fullgraph=True)
        torch.manual_seed(3)
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        losses.append(float(loss.detach()))
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)


def _lora() -> Any:
    torch.manual_seed(1)
    config = loramix.LoramixConfig(method="lora", r=4, lora_dropout=0.0, init_lora_weights=False)
    return get_peft_model(tiny.llama(layers=2), config).train()


def test_there_are_recipes_and_the_page_names_them():
    assert len(RECIPES) == 4
    for recipe in RECIPES:
        assert f"recipes/larger/{recipe.name}" in PAGE.read_text()


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_is_valid_and_its_launch_lines_name_it(recipe: Path):
    experiment = load(recipe).experiment
    assert not experiment.settings(experiment.joint_stage).problems()
    lines = [line for line in recipe.read_text().splitlines() if line.startswith("#") and " train " in line]
    assert lines
    assert all(f"recipes/larger/{recipe.name}" in line for line in lines)
    assert all(line.removeprefix("#").strip() in PAGE.read_text() for line in lines)
    assert yaml.safe_load(recipe.read_text())["output_dir"].endswith(recipe.stem)
