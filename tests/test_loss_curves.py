"""The stored 20-step loss curves: complete, equal with activation checkpointing, found again when trained anew."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

from loramix.methods import METHODS

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
STORED = json.loads((BENCHMARKS / "loss_curves.json").read_text(encoding="utf-8"))


def _script():
    spec = importlib.util.spec_from_file_location("loss_curves", BENCHMARKS / "loss_curves.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("base", ["tiny", "smollm2"])
@pytest.mark.parametrize("name", METHODS)
def test_every_method_has_a_curve(base: str, name: str):
    curve = STORED[base]["curves"][name]
    assert len(curve["plain"]) == 20
    if not METHODS[name].starts_from_experts:  # trained experts go on from where batches differ more than they learn
        assert sum(curve["plain"][-5:]) < sum(curve["plain"][:5])
    if name == "prefix":
        assert curve["checkpointed"] is None
    else:
        assert curve["checkpointed"] == pytest.approx(curve["plain"], abs=2e-3)


@pytest.mark.parametrize("name", ["moa", "mosld", "mixlora", "moelora-task", "arrow"])
def test_a_stored_curve_is_found_again(name: str, tmp_path: Path):
    found = _script().curve("tiny", tmp_path, METHODS[name], name == "mosld")
    assert found == pytest.approx(STORED["tiny"]["curves"][name]["plain"], abs=2e-3)
