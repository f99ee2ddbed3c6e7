"""The short form of `make torture`: a few of each, so that the long form works when somebody runs it."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from tests import ended
from tests.torture import disks, kills, numbers, soak


def _can_mount(place: Path) -> bool:
    place.mkdir()
    if os.geteuid() != 0:
        return False
    done = subprocess.run(["/bin/mount", "-t", "tmpfs", "tmpfs", str(place)], capture_output=True, check=False)
    return done.returncode == 0 and subprocess.run(["/bin/umount", str(place)], check=False).returncode == 0


def test_a_run_that_is_killed_goes_on_to_the_same_bits(tmp_path: Path):
    found = kills.torture(tmp_path, kills=3, inside=2, method="mosld", seed=1)
    assert found["kills"] == 3
    assert found["failed"] == 0
    assert found["equal"] == found["runs"]


@pytest.mark.parametrize("number", range(len(numbers.KINDS)), ids=numbers.KINDS)
def test_numbers_that_are_none_are_stopped_in_time(number: int, tmp_path: Path):
    found = numbers.case(tmp_path, number)
    assert found["in_time"] == 1
    assert found["on_disk"] == 0


def test_a_disk_that_refuses_is_told_in_a_line(tmp_path: Path):
    content = ended.settings(tmp_path, "lora", save_steps=1)
    ended.train(content, tmp_path / "whole")
    expected = ended.left_by(tmp_path / "whole")
    assert disks.removed(tmp_path, content, at=4)["ok"]
    if _can_mount(tmp_path / "mounted"):
        assert disks.full(tmp_path, content, expected, 150)["ok"]
        assert disks.read_only(tmp_path, content, expected, at=4)["ok"]


def test_a_server_keeps_its_memory_and_its_places():
    found = soak.soak(60, 12)
    assert found["failed"] == 0
    assert found["busy_after"] == 0
    assert found["fds"] <= 2
