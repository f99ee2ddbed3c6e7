"""The profile tells the parts of a step apart, and leaves no trace on what it watches."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from loramix.experts.fused import _Fused
from tests import tiny

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.mark.parametrize("method", ["lora", "moa", "mola", "mixlora"])
def test_each_part_is_found(monkeypatch: pytest.MonkeyPatch, method: str):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import step_parts
    from training_step import Point, TrainingStep

    base = tiny.llama(vocab=61)
    before = _Fused.__dict__["forward"], _Fused.__dict__["backward"]
    step = TrainingStep(base, Point(method=method, experts=5, rank=3, rows=2, length=12))
    step()
    weights = [p.clone() for p in step.model.parameters() if p.requires_grad]
    found = step_parts.parts_of(step, base)
    assert (_Fused.__dict__["forward"], _Fused.__dict__["backward"]) == before
    routed = {"router"} if method != "lora" else set()
    for part in {"base GEMM", "attention", "head", "adapter", "base, other", "optimizer", "data"} | routed:
        assert found[part] > 0, part
    assert method != "lora" or found["router"] == 0
    after = [p for p in step.model.parameters() if p.requires_grad]
    assert any(not torch.equal(a, b) for a, b in zip(weights, after, strict=True)), "it was a true step"
