"""A signal ends a training after its step, saved; two trainings do not share a folder; a disk that fails is said."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import yaml

from loramix.checkpoints import store as store_module
from loramix.cli.main import run
from loramix.run_folder import RunFolder
from tests import ended


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("stopping")


def _config(place: Path, folder: Path, **more: Any) -> str:
    file = folder.with_suffix(".yaml")
    file.write_text(yaml.safe_dump({**ended.settings(place, "lora", max_steps=8, **more), "output_dir": str(folder)}))
    return str(file)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("save_steps", [0, 3])
def test_a_signal_ends_after_the_step_and_the_rest_goes_on(
    number: int, code: int, save_steps: int, place: Path, capsys: pytest.CaptureFixture[str]
):
    listening = signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background does not
    whole, folder = place / f"{number}-{save_steps}-whole", place / f"{number}-{save_steps}"
    assert run(["train", _config(place, whole, save_steps=save_steps)]) == 0
    config = _config(place, folder, save_steps=save_steps)

    def signalled(call: int) -> None:
        if call == 9:  # the first micro-batch of the fifth step
            os.kill(os.getpid(), number)

    with ended.calls(*ended.STEP, signalled) as steps:
        assert run(["train", config]) == code
    assert steps == [10], "the step was finished"
    assert "mixed: stopped after step 5 of 8. The same command with --resume" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL, "as it was before"
    with ended.calls(*ended.STEP, lambda _: None) as steps:
        assert run(["train", config, "--resume"]) == 0
    assert steps == [6]
    assert ended.left_by(folder) == ended.left_by(whole)
    signal.signal(signal.SIGINT, listening)


def test_two_trainings_do_not_share_a_folder(place: Path, capsys: pytest.CaptureFixture[str]):
    folder = place / "shared"
    with RunFolder(folder).locked():
        assert run(["train", _config(place, folder)]) == 2
    assert "another loramix is at work here" in capsys.readouterr().err
    assert not folder.exists(), "nothing was written, so nothing stays"


def test_force_without_resume(place: Path, capsys: pytest.CaptureFixture[str]):
    assert run(["train", _config(place, place / "forced"), "--force"]) == 2
    assert "Give it with --resume" in capsys.readouterr().err


def test_a_full_disk_ends_with_its_code_and_goes_on_later(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    folder = place / "full"
    config, true, writes = _config(place, folder, save_steps=3), store_module.seal, [0]

    def full(*args: Any) -> None:
        writes[0] += 1
        if writes[0] == 2:
            raise OSError(28, "No space left on device")
        true(*args)

    monkeypatch.setattr(store_module, "seal", full)
    assert run(["train", config]) == 7
    said = capsys.readouterr().err
    assert "no checkpoint can be written after step 6 (No space left on device)" in said
    assert "Traceback" not in said
    monkeypatch.undo()
    with ended.calls(*ended.STEP, lambda _: None) as steps:
        assert run(["train", config, "--resume"]) == 0
    assert steps == [10], "on from step 3"
