"""Where does a training step's time and memory go, and how far is it from the machine's limit?

    OMP_NUM_THREADS=1 python benchmarks/step_profile.py [--methods lora moa mosld mola mixlora] [--json] [--out FILE]

The built-in base in fp32, eight experts of rank 8 on all linear layers, rows of mixed lengths without padding, as
`loramix train` takes a step. torch.profiler's operations are told apart by their shapes and by what they ran in:

    base GEMM    products with the frozen weights of the linear layers, forward and backward
    attention    scaled_dot_product_attention, forward and backward
    head         last states to loss, and the gradient back to them
    adapter      all other work in the experts' functions
    router       what has as many columns as there are experts, top-k, softmax
    base, other  element by element: norms, rotary positions, activations, residuals
    optimizer    AdamW
    data         putting the batch together (timed by itself)
    framework    what the step takes beside its operations (Python, autograd, the profiler itself)

The limit is the step's FLOPs over the GEMM rate measured in this process on the base's own shapes. `saved` is what the
forward keeps for the backward, weights left out, each storage once, by the module that was running when it was kept.
(Not named profile.py: Python's own cProfile would import that instead of its `profile`.)
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections import Counter
from datetime import date
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode
from training_step import Point, TrainingStep, examples_of, first_layers

from loramix import load_base
from loramix.cli.output import quiet_libraries
from loramix.environment import environment

METHODS = ("lora", "moa", "mosld", "mola", "mixlora")
LENGTHS = (512, 200, 213, 70, 74, 88, 120, 99)
"""Of the demo's rows: questions and answers of four domains."""
PARTS = ("base GEMM", "attention", "head", "adapter", "router", "base, other", "optimizer", "data", "framework")
EXPERTS_RUN_IN = ("_Fused", "_BySegment", "_Expand", "_Contract", "_Grouped")
PRODUCTS = ("aten::mm", "aten::addmm", "aten::addmm_", "aten::bmm", "aten::baddbmm")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--layers", type=int, default=0, help="the first layers of the base only; 0 for all")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    quiet_libraries()
    base = first_layers(load_base(), asked.layers)
    words = base.config.vocab_size
    rows = [one for length in LENGTHS for one in examples_of(Point(method="lora", rows=1, length=length), words)]
    for place, row in enumerate(rows):
        object.__setattr__(row, "domain_id", place)
    peak = gemm_rate(base, sum(LENGTHS))
    found = []
    for method in asked.methods:
        found.append(profiled(TrainingStep(base, Point(method=method), rows), method, base, peak, asked.rounds))
        if not asked.json:
            show(found[-1])
    report = {
        "date": date.today().isoformat(),
        "environment": environment(),
        "threads": torch.get_num_threads(),
        "lengths": LENGTHS,
        "layers": base.config.num_hidden_layers,
        "gemm_gflops": round(peak / 1e9, 1),
        "rows": found,
    }
    text = json.dumps(report, indent=2)
    if asked.out:
        asked.out.write_text(text + "\n", encoding="utf-8")
    if asked.json:
        print(text)
    return 0


def gemm_rate(base: Any, tokens: int) -> float:
    """Returns the best FLOP/s of one product on the shapes of the base's linear layers."""
    best = 0.0
    for outputs, inputs in sorted(_base_shapes(base)):
        x, weight = torch.randn(tokens, inputs), torch.randn(outputs, inputs)
        for _ in range(5):
            begun = time.process_time()
            for _ in range(4):
                x @ weight.T
            best = max(best, 4 * 2 * tokens * inputs * outputs / (time.process_time() - begun))
    return best


def profiled(step: TrainingStep, method: str, base: Any, peak: float, rounds: int) -> dict[str, Any]:
    """Returns one method's figures."""
    step()
    plain = []
    for _ in range(rounds):
        begun = time.process_time()
        step()
        plain.append(time.process_time() - begun)
    begun = time.process_time()
    batch = step.batch()
    data = time.process_time() - begun
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as record:
        begun = time.process_time()
        step.learn(batch)
        learned = time.process_time() - begun
        begun = time.process_time()
        step.update()
        updated = time.process_time() - begun
    parts = shares(record.events(), base, step)
    parts["optimizer"], parts["data"] = updated, data
    parts["framework"] = max(0.0, learned - sum(v for k, v in parts.items() if k not in ("optimizer", "data")))
    whole = sum(parts.values())
    with FlopCounterMode(display=False) as counter:
        step.learn(batch)
    step.optimizer.zero_grad()
    flops = counter.get_total_flops()
    return {
        "name": method,
        "step_cpu_s": round(median(plain), 3),
        "profiled_cpu_s": round(whole, 3),
        "shares": {name: round(parts[name] / whole, 4) for name in PARTS},
        "gflop": round(flops / 1e9, 1),
        "limit_s": round(flops / peak, 3),
        "of_limit": round(flops / peak / median(plain), 3),
        "saved_mib": saved(step, batch),
    }


def _base_shapes(base: Any) -> set[tuple[int, int]]:
    return {
        (one.out_features, one.in_features)
        for name, one in base.named_modules()
        if isinstance(one, nn.Linear) and "lm_head" not in name
    }


def shares(events: Any, base: Any, step: TrainingStep) -> dict[str, float]:
    """Returns CPU seconds by part, of the operations alone."""
    sizes = _base_shapes(base)
    pairs = {frozenset(pair) if len(set(pair)) > 1 else pair for pair in sizes}
    words = base.config.vocab_size
    experts = {len(one.loramix_bank["default"].B_EOR) for one in _layers(step)} | {
        one.loramix_bank["default"].num_experts for one in _layers(step)
    }
    found: Counter[str] = Counter()
    for event in events:
        if event.self_cpu_time_total > 0:
            found[_part(event, pairs, words, experts - {1})] += event.self_cpu_time_total / 1e6
    found.pop("optimizer", None)  # it is timed by itself
    return dict.fromkeys(PARTS, 0.0) | dict(found)


def _layers(step: TrainingStep) -> list[Any]:
    return [one for one in step.model.modules() if hasattr(one, "loramix_bank")]


def _part(event: Any, pairs: set[Any], words: int, experts: set[int]) -> str:
    names, one = [], event
    while one is not None:
        names.append(one.name)
        one = one.cpu_parent
    if any("Optimizer" in name for name in names):
        return "optimizer"
    shapes = [tuple(shape) for shape in event.input_shapes or [] if shape]
    if any("_HeadNll" in name for name in names) or any(words in shape for shape in shapes):
        return "head"
    if any("scaled_dot_product" in name for name in names):
        return "attention"
    if event.name in PRODUCTS and _with_base_weight(shapes, pairs):
        return "base GEMM"
    if any(name.startswith(EXPERTS_RUN_IN) for name in names):
        return "adapter"
    if any(shape[-1] in experts for shape in shapes) or any(n in ("aten::topk", "aten::softmax") for n in names):
        return "router"
    return "base, other"


def _with_base_weight(shapes: list[tuple[int, ...]], pairs: set[Any]) -> bool:
    """Whether one of the two factors has the shape of a frozen weight, either way round."""
    return any(
        len(shape) == 2 and ((frozenset(shape) in pairs) if shape[0] != shape[1] else (shape in pairs))
        for shape in shapes[-2:]
    )


def saved(step: TrainingStep, batch: dict[str, Any]) -> dict[str, float]:
    """Returns MiB kept for the backward by the kind of module that was running."""
    running: list[str] = []
    seen: set[int] = {p.untyped_storage().data_ptr() for p in step.model.parameters()}
    found: Counter[str] = Counter()

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in seen:
            seen.add(storage.data_ptr())
            found[running[-1] if running else "head and losses"] += storage.nbytes()
        return tensor

    hooks = []
    for module in step.model.modules():
        kind = _kind(module)
        if kind:
            hooks.append(module.register_forward_pre_hook(lambda *_, kind=kind: running.append(kind)))
            hooks.append(module.register_forward_hook(lambda *_: running.pop() and None))
    alive: list[Tensor] = []
    try:
        with saved_tensors_hooks(lambda t: (alive.append(t), keep(t))[1], lambda t: t):
            step.learn(batch)
    finally:
        for hook in hooks:
            hook.remove()
    step.optimizer.zero_grad()
    return {kind: round(size / 2**20, 1) for kind, size in found.most_common()}


def _kind(module: nn.Module) -> str | None:
    name = type(module).__name__
    if hasattr(module, "loramix_bank"):
        return "experts"
    if "Router" in name:
        return "router"
    if name.endswith("Attention"):
        return "attention"
    if name.endswith("MLP"):
        return "feed-forward"
    return "norms" if "Norm" in name else "residuals" if name.endswith("DecoderLayer") else None


def show(row: dict[str, Any]) -> None:
    print(f"\n{row['name']}: {row['step_cpu_s']} s a step, limit {row['limit_s']} s ({row['of_limit']:.0%} of it used)")
    for name, share in row["shares"].items():
        print(f"  {name:12} {share:6.1%}")
    print("  saved, MiB:", ", ".join(f"{kind} {size}" for kind, size in row["saved_mib"].items()))


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    raise SystemExit(main())
