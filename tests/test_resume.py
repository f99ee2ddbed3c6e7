"""A run that was ended anywhere goes on and leaves, bit for bit, what it would have left."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from loramix import pipeline
from loramix.errors import ConfigError
from loramix.methods import METHODS
from tests import ended

TRAINED = [name for name, method in METHODS.items() if any(stage.trains for stage in method.stages)]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("ended")


@pytest.mark.parametrize("method", TRAINED)
def test_every_method_goes_on_as_if_nothing_had_happened(method: str, place: Path):
    content = ended.settings(place, method)
    whole, broken = place / f"{method}-whole", place / f"{method}-broken"
    with ended.calls(*ended.STEP, lambda _: None) as steps:
        ended.train(content, whole)
    # Once soon after the beginning, and once in the last stage, after a checkpoint.
    for ending in (7, steps[0] - 6 - 3):
        with pytest.raises(ended.Killed), ended.calls(*ended.STEP, ended.killed_at(ending)):
            ended.train(content, broken, resume=True)
    ended.train(content, broken, resume=True)
    assert ended.left_by(broken) == ended.left_by(whole)
    assert "going on after step" in broken.with_suffix(".screen").read_text()


def test_a_stage_that_ended_before_it_was_saved_takes_no_step_more(place: Path):
    content = ended.settings(place, "lora", save_steps=1)
    ended.train(content, place / "last-whole")
    with pytest.raises(ended.Killed), ended.calls(pipeline, "save", ended.killed_at(1)):
        ended.train(content, place / "last")
    ended.train(content, place / "last", resume=True)
    assert ended.left_by(place / "last") == ended.left_by(place / "last-whole")


def test_a_finished_run_is_finished(place: Path):
    content = ended.settings(place, "lora")
    first = ended.train(content, place / "once")
    with ended.calls(*ended.STEP, lambda _: None) as steps:
        assert ended.train(content, place / "once", resume=True) == json.loads(json.dumps(first))
    assert steps == [0]


def test_another_run_does_not_go_on(place: Path):
    content = ended.settings(place, "lora")
    folder = place / "other"
    with pytest.raises(ended.Killed), ended.calls(*ended.STEP, ended.killed_at(7)):
        ended.train(content, folder)
    with pytest.raises(ConfigError, match="holds a run already"):
        ended.train(content, folder)
    other = {**content, "training": {**content["training"], "learning_rate": 1e-3}, "adapter": {"r": 4}}
    with pytest.raises(ConfigError) as refused:
        ended.train(other, folder, resume=True)
    told = str(refused.value)
    assert "settings.training.learning_rate: was not there, is now 0.001" in told
    assert "settings.adapter.r: was" in told
    assert "settings.adapter.lora_dropout: was 0.1" in told
    ended.train(
        {**content, "training": {**content["training"], "learning_rate": 1e-3}}, folder, resume=True, force=True
    )
    assert "going on although these differ" in folder.with_suffix(".screen").read_text()
