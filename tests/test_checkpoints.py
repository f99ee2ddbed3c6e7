"""A checkpoint is whole or it is none: damage of every kind is seen, the one before is taken, nothing is half."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from loramix.checkpoints import store as store_module
from loramix.checkpoints.manifest import MANIFEST, Damaged, verified
from loramix.checkpoints.random_state import random_state, set_random_state
from loramix.checkpoints.store import CheckpointStore
from loramix.errors import StorageError

WEIGHTS, STATE = "weights.safetensors", "processes.json"  # as a real one names them: make torture damages those
ABOUT = {"run": "of this test", "log_bytes": 0}


def _fill(folder: Path) -> None:
    save_file({"weight": torch.randn(20, 3)}, folder / WEIGHTS)
    (folder / STATE).write_text(json.dumps({"step": 3, "text": "ä"}), encoding="utf-8")


def _store(folder: Path, steps: int = 2) -> CheckpointStore:
    store = CheckpointStore(folder / "checkpoints")
    store.begin()
    for step in range(10, 10 + steps):
        store.write(step, ABOUT, _fill)
    return store


def _newest(store: CheckpointStore) -> tuple[int | None, list[str]]:
    found, wrong = store.newest(lambda about: None if about["run"] == ABOUT["run"] else "of another run")
    return (None if found is None else found.step), wrong


def test_the_newest_stay(tmp_path: Path):
    store = _store(tmp_path, 4)
    assert sorted(one.name for one in store.folder.iterdir()) == ["step-00000012", "step-00000013"]
    assert _newest(store) == (13, [])


def test_every_flipped_bit_is_seen(tmp_path: Path):
    """A short form of `make torture`."""
    folder = _store(tmp_path, 1).folder / "step-00000010"
    draw = random.Random(0)
    for file in sorted(folder.iterdir()):
        whole = file.read_bytes()
        for _ in range(40):
            place = draw.randrange(8 * len(whole))
            flipped = bytearray(whole)
            flipped[place // 8] ^= 1 << place % 8
            file.write_bytes(flipped)
            with pytest.raises(Damaged):
                verified(folder)
        file.write_bytes(whole)
    assert verified(folder)["step"] == 10


def _replaced(name: str, content: bytes) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes(content)  # type: ignore[return-value]


def _linked(folder: Path) -> None:
    shutil.move(folder / STATE, folder.parent.parent / "elsewhere.json")
    (folder / STATE).symlink_to(folder.parent.parent / "elsewhere.json")


def _folder_linked(folder: Path) -> None:
    shutil.move(folder, folder.parent.parent / "elsewhere")
    folder.symlink_to(folder.parent.parent / "elsewhere")


def _before(folder: Path) -> Path:
    return min(folder.parent.glob("step-*"))


def _from_before(folder: Path) -> None:
    shutil.copy(_before(folder) / WEIGHTS, folder / WEIGHTS)


def _whole_from_before(folder: Path) -> None:
    before = _before(folder)
    shutil.rmtree(folder)
    shutil.copytree(before, folder)


def _schema(folder: Path) -> None:
    content = json.loads((folder / MANIFEST).read_text())
    content["content"]["schema"] = 99
    (folder / MANIFEST).write_text(json.dumps(content))


DAMAGE: dict[str, Callable[[Path], object]] = {
    "no manifest": lambda folder: (folder / MANIFEST).unlink(),
    "empty manifest": _replaced(MANIFEST, b""),
    "half a manifest": lambda folder: os.truncate(folder / MANIFEST, 100),
    "manifest of something else": _replaced(MANIFEST, b"[1, 2]"),
    "edited manifest": _schema,
    "huge manifest": _replaced(MANIFEST, b" " * (2 << 20)),
    "nested manifest": _replaced(MANIFEST, b"[" * 200_000),
    "missing file": lambda folder: (folder / STATE).unlink(),
    "empty file": _replaced(STATE, b""),
    "truncated file": lambda folder: os.truncate(folder / WEIGHTS, 50),
    "longer file": lambda folder: _replaced(WEIGHTS, (folder / WEIGHTS).read_bytes() + b"\0")(folder),
    "other content": _replaced(STATE, b'{"step": 4, "text": "o"}'),
    "one file more": _replaced("more.json", b"{}"),
    "a folder inside": lambda folder: (folder / "inside").mkdir(),
    "file of another checkpoint": _from_before,
    "another checkpoint under this name": _whole_from_before,
    "file is a link": _linked,
    "folder is a link": _folder_linked,
    "a file instead of the folder": lambda folder: (shutil.rmtree(folder), folder.write_text("x")),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_checkpoint_gives_way_to_the_one_before(kind: str, tmp_path: Path):
    store = _store(tmp_path)
    DAMAGE[kind](store.folder / "step-00000011")
    step, wrong = _newest(store)
    assert step == 10
    assert len(wrong) == 1
    assert "step-00000011" in wrong[0]
    store.write(11, ABOUT, _fill)
    assert _newest(store) == (11, []), "the training came by again"
    assert "\n" not in wrong[0]


def test_where_all_are_damaged_there_is_none(tmp_path: Path):
    store = _store(tmp_path)
    for folder in store.folder.iterdir():
        (folder / MANIFEST).unlink()
    step, wrong = _newest(store)
    assert step is None
    assert len(wrong) == 2


@pytest.mark.parametrize("call", range(1, 9))
def test_a_disk_that_fails_at_any_moment_leaves_the_one_before(
    call: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    store = _store(tmp_path, 1)
    before = {file: file.read_bytes() for file in store.folder.rglob("*") if file.is_file()}
    count = [0]

    def failing(true: Callable[..., object]) -> Callable[..., object]:
        def watched(*args: object, **kwargs: object) -> object:
            count[0] += 1
            if count[0] == call:
                raise OSError(28, "No space left on device")
            return true(*args, **kwargs)

        return watched

    for owner, name in ((os, "fsync"), (os, "open"), (Path, "mkdir"), (Path, "rename")):
        monkeypatch.setattr(owner, name, failing(getattr(owner, name)))
    with pytest.raises(StorageError, match=r"after step 20 \(No space left on device\)"):
        store.write(20, ABOUT, _fill)
    monkeypatch.undo()
    assert {file: file.read_bytes() for file in before} == before
    assert _newest(store) == (10, [])
    store.write(21, ABOUT, _fill)
    assert _newest(store) == (21, []), "what was left half is swept away"


def test_too_little_room_is_seen_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    store = _store(tmp_path, 1)
    monkeypatch.setattr(store_module.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(100, 99, 1))
    with pytest.raises(StorageError, match="0 MB are free"):
        store.write(20, ABOUT, _fill)
    assert [one.name for one in store.folder.iterdir()] == ["step-00000010"]


def test_random_numbers_go_on():
    state = json.loads(json.dumps(random_state()))
    expected = [random.random(), float(torch.rand(())), torch.randn(3).tolist()]
    set_random_state(state)
    assert [random.random(), float(torch.rand(())), torch.randn(3).tolist()] == expected
