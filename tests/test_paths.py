"""Names never become places elsewhere, and links out of a run's folder are not followed."""

from __future__ import annotations

from pathlib import Path

import pytest

from loramix.data.domains import name_problem
from loramix.errors import ConfigError
from loramix.opening import open_run
from loramix.run_folder import RunFolder
from tests import ended
from tests.path_names import path_names


def test_a_name_that_is_taken_stays_in_the_folder(tmp_path: Path):
    names = path_names()
    assert len(names) == 200
    taken = [name for name in names if name_problem(name) is None]
    assert len(taken) < 40
    for name in taken:
        run = RunFolder(tmp_path / "run")
        for folder in (run.expert(name), run.longer(name)):
            assert folder.resolve().parent.parent == (tmp_path / "run").resolve(), name


@pytest.mark.parametrize("what", ["config.yaml", "log.jsonl", ".lock", "model", "experts/adds", "checkpoints"])
def test_links_out_of_a_run_are_not_followed(what: str, tmp_path: Path):
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "precious").write_text("precious")
    folder = tmp_path / "run"
    (folder / what).parent.mkdir(parents=True)
    is_file = "." in what
    (folder / what).symlink_to(outside / "precious" if is_file else outside)
    for work in (open_run, lambda path: ended.train(ended.settings(tmp_path, "lora"), path)):
        with pytest.raises(ConfigError, match=r"is a link to .*outside.*, out of the run's folder"):
            work(folder)
    assert sorted(one.name for one in outside.iterdir()) == ["precious"]
    assert (outside / "precious").read_text() == "precious"


def test_links_inside_a_run_and_to_it_are_fine(tmp_path: Path):
    run = RunFolder(tmp_path / "run")
    run.path.mkdir()
    run.config.write_text("x")
    (run.path / "copy.yaml").symlink_to(run.config)
    (tmp_path / "link").symlink_to(run.path)
    assert RunFolder.opened(tmp_path / "link").path == tmp_path / "link"
