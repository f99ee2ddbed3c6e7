"""Steps that make no sense are left out, undone or end the training; none of their numbers is ever written."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from loramix.errors import Diverged
from loramix.routing import Routing
from loramix.training.collapse import LOOKS, CollapseWatch
from loramix.training.guard import PATIENCE, StepGuard
from loramix.training.smaller_batches import in_parts
from loramix.training.trainer import MixtureTrainer
from tests import ended


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("guards")


@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf])
def test_what_is_no_number_makes_no_sense(loss: float):
    guard = StepGuard(100)
    assert guard.judge(2.0, 1.0) is None
    assert "loss" in str(guard.judge(loss, 1.0))
    assert "gradient" in str(guard.judge(2.0, loss))


def test_a_jump_is_far_above_chance_and_above_what_was_usual():
    guard = StepGuard(100)  # a uniform guess costs 4.6 nats
    assert guard.judge(9.0, 1.0) is None, "nothing is known yet"
    assert guard.judge(15.0, 1.0) is None, "twice the usual is 18"
    for _ in range(20):
        assert guard.judge(1.0, 1.0) is None
    assert guard.judge(5.5, 1.0) is None, "not worse than a guess"
    assert guard.judge(5.7, 1.0) == "its loss jumped from 1.00 to 5.70"


def test_patience_ends_after_some_in_a_row():
    guard = StepGuard(100)
    for number in range(1, PATIENCE + 1):
        guard.judge(math.nan, 1.0)
        assert guard.out_of_patience == (number == PATIENCE)
    twin = StepGuard(100)
    twin.set_state(json.loads(json.dumps(guard.state())))
    assert twin.out_of_patience
    guard.judge(1.0, 1.0)
    assert not guard.out_of_patience


def finite_on_disk(folder: Path) -> None:
    """Fails if a file of a run holds a number that is not finite."""
    for file in folder.rglob("*"):
        if file.suffix == ".safetensors":
            assert all(bool(torch.isfinite(tensor).all()) for tensor in load_file(file).values()), file
        elif file.suffix in (".json", ".jsonl"):
            assert not {"NaN", "Infinity"} & set(file.read_text().replace(",", " ").replace("}", " ").split()), file


def spoiled(what: str, value: float, at: Callable[[int], bool]) -> Callable[[Any], Any]:
    """Returns a compute_loss whose loss, gradient or weights are not finite in some steps."""
    true = MixtureTrainer.compute_loss

    def loss_of(self: MixtureTrainer, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        step = self.state.global_step + 1
        loss = true(self, model, inputs, *args, **kwargs)
        if not at(step):
            return loss
        if what == "loss":
            self._step_nll = self._step_nll + value
            return loss + value
        weight = next(weight for weight in model.parameters() if weight.requires_grad)
        if what == "gradient":
            return loss + (weight * 0).sum() * value
        with torch.no_grad():
            weight[...] = value
        return true(self, model, inputs, *args, **kwargs)

    return loss_of


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_one_bad_step_is_left_out(what: str, place: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(MixtureTrainer, "compute_loss", spoiled(what, math.nan, lambda step: step == 3))
    folder = place / f"one-{what}"
    results = ended.train(ended.settings(place, "lora"), folder)
    assert results["stages"]["mixed"]["steps"] == 5
    assert math.isfinite(results["stages"]["mixed"]["loss"])
    assert "step 3 is left out" in folder.with_suffix(".screen").read_text()
    finite_on_disk(folder)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_broken_weights_are_put_back(value: float, place: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(MixtureTrainer, "compute_loss", spoiled("weights", value, lambda step: step == 6))
    folder = place / f"back-{value}"
    results = ended.train(ended.settings(place, "lora", max_steps=12), folder)
    assert results["stages"]["mixed"]["went_back"] == 1
    assert "went back to the weights after step 4" in folder.with_suffix(".screen").read_text()
    finite_on_disk(folder)


def test_a_stage_whose_last_steps_made_no_sense_ends_with_the_weights_before(
    place: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(MixtureTrainer, "compute_loss", spoiled("weights", math.nan, lambda step: step == 5))
    folder = place / "end"
    assert ended.train(ended.settings(place, "lora"), folder)["stages"]["mixed"]["went_back"] == 1
    finite_on_disk(folder)
    with pytest.raises(Diverged, match="the last 1 of the stage"):
        ended.train(ended.settings(place, "lora", save_steps=0), place / "end-without")


@pytest.mark.parametrize(
    ("what", "value"), [("loss", math.nan), ("loss", math.inf), ("gradient", math.nan), ("weights", math.nan)]
)
def test_a_training_that_stays_broken_ends(what: str, value: float, place: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(MixtureTrainer, "compute_loss", spoiled(what, value, lambda step: step >= 5))
    folder = place / f"ends-{what}-{value}"
    with pytest.raises(Diverged, match=r"3 steps in a row made no sense.*Lower learning_rate") as ending:
        ended.train(ended.settings(place, "lora", max_steps=20), folder)
    assert ending.value.exit_code == 6
    assert "the last of them step 10" in str(ending.value), "went back after 7, gave up 3 steps later"
    finite_on_disk(folder)
    monkeypatch.undo()
    results = ended.train(ended.settings(place, "lora", max_steps=20), folder, resume=True)
    assert results["stages"]["mixed"]["steps"] == 20


def test_a_learning_rate_a_thousand_times_too_high_ends(place: Path):
    folder = place / "rate"
    content = ended.settings(
        place, "lora", learning_rate=30.0, max_steps=20, lr_scheduler_type="constant", save_steps=0
    )
    with pytest.raises(Diverged, match="learning_rate"):
        ended.train(content, folder)
    finite_on_disk(folder)


def test_rows_in_parts_are_all_rows():
    batch = {"labels": torch.arange(14).view(7, 2), "positions": torch.arange(3), "domain_ids": torch.arange(7)}
    for parts in (1, 2, 3, 8):
        made = list(in_parts(batch, parts))
        assert len(made) == min(parts, 7)
        assert torch.equal(torch.cat([one["labels"] for one in made]), batch["labels"])
        assert all(torch.equal(one["positions"], batch["positions"]) for one in made)


@pytest.mark.parametrize("kind", [torch.OutOfMemoryError, MemoryError])
def test_out_of_memory_costs_no_sample(kind: type[BaseException], place: Path, monkeypatch: pytest.MonkeyPatch):
    content = ended.settings(place, "lora")
    content["adapter"] = {"lora_dropout": 0.0}  # each part draws its own
    plain = ended.train(content, place / f"room-{kind.__name__}")
    true, seen = MixtureTrainer.compute_loss, []

    def narrow(self: MixtureTrainer, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        loss = true(self, model, inputs, *args, **kwargs)
        seen.append(len(inputs["domain_ids"]))
        if len(inputs["domain_ids"]) > 1 and self.state.global_step >= 1 and len(seen) % 2:
            loss.backward(retain_graph=True)  # some of the backward is done when memory runs out
            raise kind("no room")
        return loss

    monkeypatch.setattr(MixtureTrainer, "compute_loss", narrow)
    folder = place / f"narrow-{kind.__name__}"
    results = ended.train(content, folder)
    stage, expected = results["stages"]["mixed"], plain["stages"]["mixed"]
    assert stage["parts"] in (2, 4)
    assert stage["tokens"] == expected["tokens"]
    assert stage["loss"] == pytest.approx(expected["loss"], rel=1e-4)
    assert "out of memory" in folder.with_suffix(".screen").read_text()
    one, other = (
        load_file(path / "model" / "adapter_model.safetensors") for path in (folder, place / f"room-{kind.__name__}")
    )
    for name, tensor in one.items():
        torch.testing.assert_close(tensor, other[name], rtol=1e-3, atol=1e-5)
    first, second = (
        [json.loads(line) for line in (path / "log.jsonl").read_text().splitlines()]
        for path in (folder, place / f"room-{kind.__name__}")
    )
    for entry, same in zip(first, second, strict=True):
        for key in entry:
            if key.startswith("loss/"):
                assert entry[key] == pytest.approx(same[key], rel=1e-3)


def test_a_single_row_that_does_not_fit_ends(place: Path, monkeypatch: pytest.MonkeyPatch):
    def never(*_: Any, **__: Any) -> Any:
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(MixtureTrainer, "compute_loss", never)
    with pytest.raises(MemoryError):
        ended.train(ended.settings(place, "lora"), place / "no-room")


def _routing(weights_SE: torch.Tensor, level: str) -> Routing:
    mask = torch.ones(len(weights_SE), dtype=torch.bool)
    return Routing(None, weights_SE, weights_SE.log(), level, mask, weights_SE)  # type: ignore[arg-type]


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_a_collapsed_router_is_told_once_with_numbers(level: str):
    watch, rows = CollapseWatch(), torch.tensor([0, 1, 2, 0])
    even = _routing(torch.eye(3)[rows] * 0.97 + 0.01, level)
    gone = _routing(torch.tensor([[0.01, 0.98, 0.01]] * 4), level)
    for _ in range(LOOKS):
        watch.look({"layers.0": even}, rows, 3)
        assert watch.verdict() is None
    watch = CollapseWatch()
    for _ in range(LOOKS):
        assert watch.verdict() is None
        watch.look({"layers.0": even, "layers.1": gone}, rows, 3)
    said = str(watch.verdict())
    assert "1 of 2 routers send nearly all to one expert; layers.1 sends" in said
    assert "to expert 1" in said
    assert watch.numbers()["router_load_max"] == pytest.approx(0.98 if level == "token" else 1.0)
    assert watch.verdict() is None, "said once"


def test_a_router_by_sequence_may_send_one_domain_to_one_expert():
    watch, rows = CollapseWatch(), torch.tensor([1, 1, 1, 1])
    for _ in range(LOOKS):
        watch.look({"layers.0": _routing(torch.tensor([[0.01, 0.98, 0.01]] * 4), "sequence")}, rows, 3)
    assert watch.verdict() is None


def test_the_log_tells_the_load_of_the_routers(place: Path):
    folder = place / "load"
    ended.train(ended.settings(place, "mola"), folder)
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    entries = [line for line in lines if "loss" in line]
    assert len(entries) == 2
    assert all(0 < line["router_load_max"] <= 1 and 0 <= line["router_entropy_min"] <= 1 for line in entries)
