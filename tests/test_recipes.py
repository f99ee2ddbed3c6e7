"""Every shipped recipe runs two steps of each stage on the tiny base."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from loramix.cli.main import run
from tests import tiny

RECIPES = sorted((Path(__file__).parent.parent / "recipes").glob("*.yaml"))


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_recipe_runs(recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    base = tiny.save_base(tmp_path / "base")
    sources = iter(tiny.toy_domains(tmp_path / "data").values())
    overrides = [f"output_dir={tmp_path / 'run'}", f"model_name_or_path={base}", "dtype=float32", "max_steps=2"]
    overrides += [
        f"data.domains.{name}={next(sources)}" for name in yaml.safe_load(recipe.read_text())["data"]["domains"]
    ]
    assert run(["train", str(recipe), *overrides, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["rows"]


def test_there_are_recipes():
    assert RECIPES
