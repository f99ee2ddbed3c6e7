"""Every comparison recipe that is shipped runs on the tiny base: two steps of each stage, every row."""

from __future__ import annotations

from itertools import cycle
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console

from loramix.comparison.compare import compare
from loramix.comparison.settings import load_comparison
from tests import tiny

FOLDER = Path(__file__).parent.parent / "recipes" / "compare"
RECIPES = sorted(FOLDER.glob("*.yaml"))


def _whole(path: Path) -> dict[str, Any]:
    content = yaml.safe_load(path.read_text())
    if "extends" in content:
        parent = _whole(FOLDER / content["extends"])
        content = {**parent, **content, "data": {**parent["data"], **content.get("data", {})}}
    return content


@pytest.fixture(scope="module")
def ground(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("recipes")
    tiny.save_base(folder / "base")
    tiny.toy_domains(folder / "data", train=8, test=4)
    return folder


def _sources(names: Any, ground: Path) -> list[str]:
    toys = cycle(sorted((ground / "data").iterdir()))
    return [f"{name}={next(toys)}" for name in names]


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_recipe_runs(recipe: Path, ground: Path, tmp_path: Path):
    content = _whole(recipe)
    overrides = [f"data.domains.{one}" for one in _sources(content["data"]["domains"], ground)]
    overrides += [f"data.unseen.{one}" for one in _sources(content["data"].get("unseen", {}), ground)]
    for label, row in content["methods"].items():
        own = ((row or {}).get("data") or {}).get("domains", {})
        # A label may hold dots and commas, so a row's own sources are set in a copy of the file.
        for one in _sources(own, ground):
            name, _, source = one.partition("=")
            content["methods"][label]["data"]["domains"][name] = source
    changed = tmp_path / recipe.name
    child = yaml.safe_load(recipe.read_text())
    child["methods"] = content["methods"]
    if "extends" in child:
        child["extends"] = str(FOLDER / child["extends"])
    changed.write_text(yaml.safe_dump(child, sort_keys=False, allow_unicode=True))
    overrides += [
        f"output_dir={tmp_path / 'out'}",
        f"cells={ground / 'cells'}",
        f"model_name_or_path={ground / 'base'}",
    ]
    overrides += ["dtype=float32", "seeds=[0]", "settings=[mixture]", "max_steps=2", "adapter.r=2"]
    overrides += ["per_device_train_batch_size=2", "gradient_accumulation_steps=1", "data.max_length=256"]
    overrides += [
        "data.max_train_examples=4",
        "data.max_test_examples=2",
        "data.truncation=right",
        "data.overlap=ignore",
    ]
    overrides += ["measure.answers=1", "measure.max_new_tokens=4", "measure.resamples=100"]
    done = compare(load_comparison(changed, overrides).comparison, Console(quiet=True))
    assert done.failed == []
    results = done.results
    labels = {row["label"] for row in results["rows"] if row["scores"].get("perplexity")}
    assert labels == set(content["methods"])


def test_there_are_recipes():
    assert {"moa-small", "mosld-small", "moa-paper", "mosld-paper"} <= {path.stem for path in RECIPES}
