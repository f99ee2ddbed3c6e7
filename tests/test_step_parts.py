"""The profile tells the parts of a step apart, in fp32 and in autocast, and leaves no trace; what dropout keeps."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from loramix.experts.fused import _Fused
from tests import tiny

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


def _step(method: str, bf16: bool, dropout: float = 0.0) -> tuple[Any, Any]:
    """A step of the benchmarks on a tiny base, and the base."""
    from training_step import Point, TrainingStep

    base = tiny.llama(vocab=61).to(torch.bfloat16 if bf16 else torch.float32)
    point = Point(method=method, experts=5, rank=3, rows=2, length=12, bf16=bf16, dropout=dropout)
    return TrainingStep(base, point), base


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("method", ["lora", "moa", "mola", "mixlora"])
def test_each_part_is_found(monkeypatch: pytest.MonkeyPatch, method: str, bf16: bool):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import step_parts

    before = _Fused.__dict__["forward"], _Fused.__dict__["backward"]
    step, base = _step(method, bf16, dropout=0.05)
    step()
    weights = [p.clone() for p in step.model.parameters() if p.requires_grad]
    found = step_parts.parts_of(step, base)
    assert (_Fused.__dict__["forward"], _Fused.__dict__["backward"]) == before
    assert not any("forward" in bank.__dict__ for bank in step_parts.banks(step))
    routed = {"router"} if method != "lora" else set()
    for part in {"base GEMM", "attention", "head", "adapter", "base, other", "optimizer", "data"} | routed:
        assert found[part] > 0, part
    assert method != "lora" or found["router"] == 0
    after = [p for p in step.model.parameters() if p.requires_grad]
    assert any(not torch.equal(a, b) for a, b in zip(weights, after, strict=True)), "it was a true step"


class _Products(TorchDispatchMode):
    """Counts products with the base's weights by type, and which operations went to which part of a stopwatch."""

    def __init__(self, watch: Any) -> None:
        super().__init__()
        self.watch, self.types, self.parts = watch, Counter(), {}
        self.autocast: list[bool] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name, part = func.name().split(".")[0], self.watch._part(func, args, out)
        self.parts.setdefault(part, Counter())[name] += 1
        if part == "base GEMM":
            self.types[out.dtype] += 1
        return out


def _seen(method: str, bf16: bool, dropout: float = 0.0) -> _Products:
    import step_parts

    step, base = _step(method, bf16, dropout)
    watch = step_parts.Stopwatch(step, base)
    seen = _Products(watch)
    layer = step.model.get_base_model().model.layers[0]
    layer.register_forward_pre_hook(lambda *_: seen.autocast.append(torch.is_autocast_enabled("cpu")) and None)
    with step_parts.named_functions(watch), step_parts.known_places(watch, step.model), seen:
        step.learn(step.batch())
    trained = [p for p in step.model.parameters() if p.requires_grad]
    assert {p.dtype for p in trained} == {p.grad.dtype for p in trained if p.grad is not None} == {torch.float32}
    return seen


@pytest.mark.parametrize("method", ["lora", "moa", "mosld", "mola", "mixlora"])
def test_products_run_in_bf16_and_are_the_same_ones(monkeypatch: pytest.MonkeyPatch, method: str):
    """The step does not go through Trainer.train(), which is what puts autocast around the forward."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    full, half = _seen(method, False), _seen(method, True)
    assert set(full.types) == {torch.float32}
    assert set(half.types) == {torch.bfloat16}
    assert full.types.total() == half.types.total()
    assert not any(full.autocast)
    assert half.autocast
    assert all(half.autocast)
    # All other products are the experts', the routers' and the head's: none is taken for the base's own work.
    for seen in (full, half):
        assert not {"aten::mm", "aten::bmm", "aten::addmm", "aten::addmm_", "aten::baddbmm"} & set(
            seen.parts["base, other"]
        )


def test_dropout_belongs_to_the_experts(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    for bf16 in (False, True):
        without, dropped = _seen("mola", bf16), _seen("mola", bf16, dropout=0.5)
        assert dropped.parts["adapter"].total() > without.parts["adapter"].total()
        assert dropped.parts["base, other"] == without.parts["base, other"]


@pytest.mark.parametrize(("dtype", "of_torch"), [(torch.float32, 4.0), (torch.bfloat16, 2.0)])
def test_dropout_keeps_a_byte_for_each_number(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, of_torch: float):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import dropout_cost

    found = dropout_cost.compared(64, 48, 0.1, dtype, 2)
    assert (found["torch_kept"], found["loramix_kept"]) == (of_torch, 1.0)
    assert found["torch_ms"] > 0 < found["loramix_ms"]


def test_the_report_of_speed_is_all_that_comes_out(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """Stock trainers print on the standard output."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import train_speed

    def prepared(*_: Any, **__: Any) -> Any:
        print("fetching ...")
        return SimpleNamespace(rows=[], supervised=0)

    def measured(*_: Any) -> dict[str, Any]:
        print({"train_runtime": 1.0})
        return {}

    monkeypatch.setattr(train_speed, "prepared", prepared)
    monkeypatch.setattr(train_speed, "measured", measured)
    monkeypatch.setattr(train_speed, "rows", lambda *_: [])
    monkeypatch.setattr("sys.argv", ["train_speed.py", "--json"])
    assert train_speed.main() == 0
    assert json.loads(capsys.readouterr().out)["rows"] == []
