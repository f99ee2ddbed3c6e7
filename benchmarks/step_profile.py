"""Where does a training step's time and memory go, and how far is it from the machine's limit?

    OMP_NUM_THREADS=1 python benchmarks/step_profile.py [--rounds 3] [--json] [--out FILE] [--plot FILE.svg]
    OMP_NUM_THREADS=1 python benchmarks/step_profile.py --bf16 --dropout 0.05

The built-in base, eight experts of rank 8 on all linear layers, rows of mixed lengths without padding, as
`loramix train` takes a step. Everything is fp32; with --bf16 the base's weights are bfloat16 and the forward runs in
autocast, as `dtype: bfloat16` and `bf16: true` have it, while the weights of experts and routers and AdamW's state stay
fp32. --dropout is the experts' on their input (0 by default). Each operation, forward and backward, is timed in the
thread's CPU time, and told apart by its shapes and by which of our autograd functions and modules it, or its forward,
ran in:

    base GEMM    products with the frozen weights of the linear layers, forward and backward
    attention    scaled_dot_product_attention, forward and backward
    head         last states to loss, and the gradient back to them
    adapter      all other work in the experts, their dropout and casts among it
    router       the routers, and what has as many columns as there are experts, top-k, softmax
    base, other  element by element: norms, rotary positions, activations, residuals
    optimizer    AdamW
    data         putting the batch together
    framework    what a step that nothing watches takes beside its operations (Python, autograd), never below 0

The limit is the step's FLOPs, counted with all products and half of each attention's square, over the GEMM rate
measured in turns with the steps on the base's own shapes, in the base's type. `saved` is what the forward keeps for the
backward, weights left out, each storage once, by the module that was running when it was kept. (Not named profile.py:
Python's own cProfile would import that instead of its `profile`.)
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections import Counter
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from statistics import median
from typing import Any

import torch
from step_parts import PARTS, base_shapes, parts_of, plain_seconds
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from training_step import Point, TrainingStep, examples_of, first_layers

from loramix import load_base
from loramix.cli.output import quiet_libraries
from loramix.environment import environment
from loramix.planning.flops import counting
from loramix.reports import svg
from loramix.training.smaller_batches import PROCESSOR_TOKENS

METHODS = ("lora", "moa", "mosld", "mola", "mixlora")
LENGTHS = (512, 200, 213, 70, 74, 88, 120, 99)
"""Of the demo's rows: questions and answers of four domains."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--layers", type=int, default=0, help="the first layers of the base only; 0 for all")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--bf16", action="store_true", help="base in bfloat16, products in autocast")
    parser.add_argument("--dropout", type=float, default=0.0, help="on the experts' input")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--plot", type=Path, help="a picture of the shares")
    asked = parser.parse_args()
    quiet_libraries()
    base = first_layers(load_base(dtype="bfloat16" if asked.bf16 else "float32"), asked.layers)
    words = base.config.vocab_size
    rows = [one for length in LENGTHS for one in examples_of(Point(method="lora", rows=1, length=length), words)]
    for place, row in enumerate(rows):
        object.__setattr__(row, "domain_id", place)
    found = []
    for method in asked.methods:
        point = Point(method=method, dropout=asked.dropout, bf16=asked.bf16)
        found.append(profiled(TrainingStep(base, point, rows), method, base, asked.rounds))
        if not asked.json:
            show(found[-1])
    report = {
        "date": date.today().isoformat(),
        "environment": environment(),
        "threads": torch.get_num_threads(),
        "lengths": LENGTHS,
        "layers": base.config.num_hidden_layers,
        "bf16": asked.bf16,
        "dropout": asked.dropout,
        "rows": found,
    }
    text = json.dumps(report, indent=2)
    if asked.out:
        asked.out.write_text(text + "\n", encoding="utf-8")
    if asked.plot:
        draw(found, asked.plot)
    if asked.json:
        print(text)
    return 0


def gemm_rate(base: Any, tokens: int) -> float:
    """Returns the best FLOP/s of one product on the shapes of the base's linear layers, in the base's type and the
    thread's CPU time."""
    best = 0.0
    for outputs, inputs in sorted(base_shapes(base)):
        x, weight = (torch.randn(size, inputs, dtype=base.dtype) for size in (tokens, outputs))
        for _ in range(3):
            begun = time.thread_time()
            for _ in range(4):
                x @ weight.T
            best = max(best, 4 * 2 * tokens * inputs * outputs / (time.thread_time() - begun))
    return best


def profiled(step: TrainingStep, method: str, base: Any, rounds: int) -> dict[str, Any]:
    """Returns one method's figures; whole steps, watched steps and the GEMM rate take turns."""
    step()
    plain, watched, peaks = [], [], []
    for _ in range(rounds):
        plain.append(plain_seconds(step))
        watched.append(parts_of(step, base))
        peaks.append(gemm_rate(base, PROCESSOR_TOKENS))
    whole, peak = median(plain), median(peaks)
    parts = {name: median(one[name] for one in watched) for name in PARTS}
    parts["framework"] = max(0.0, whole - sum(parts.values()))
    batch = step.batch()
    with counting() as counter:
        step.learn(batch)
    step.optimizer.zero_grad()
    attention = sum(n for op, n in counter.get_flop_counts()["Global"].items() if "attention" in str(op))
    flops = counter.get_total_flops() - attention // 2  # of causal attention the upper half is never worked out
    return {
        "name": method,
        "step_cpu_s": round(whole, 3),
        "shares": {name: round(parts[name] / sum(parts.values()), 4) for name in PARTS},
        "gflop": round(flops / 1e9, 1),
        "gemm_gflops": round(peak / 1e9, 1),
        "limit_s": round(flops / peak, 3),
        "of_limit": round(flops / peak / whole, 3),
        "saved_mib": saved(step, batch),
    }


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
            # always_call: reading a prompt ends in the middle of a forward
            hooks.append(module.register_forward_hook(lambda *_: running.pop() and None, always_call=True))
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


def draw(rows: Sequence[dict[str, Any]], file: Path) -> None:
    """Writes the picture: a bar of shares for each method."""
    shown = [part for part in PARTS if any(row["shares"][part] >= 0.005 for row in rows)]
    names = [row["name"] for row in rows]
    with svg.style():
        drawn = svg.figure(7.2, 3.2)
        axes = drawn.add_subplot()
        left = [0.0] * len(rows)
        for number, part in enumerate(shown):
            widths = [100 * row["shares"][part] for row in rows]
            bars = axes.barh(
                names, widths, left=left, color=svg.SERIES[number % len(svg.SERIES)], label=part, height=0.7
            )
            axes.bar_label(
                bars, [f"{width:.0f}" if width >= 4 else "" for width in widths], label_type="center", color="white"
            )
            left = [a + b for a, b in zip(left, widths, strict=True)]
        axes.invert_yaxis()
        axes.set_xlim(0, 100)
        axes.set_xlabel("percent of a step")
        axes.legend(frameon=False, ncols=4, loc="lower center", bbox_to_anchor=(0.45, 1.0))
        file.parent.mkdir(parents=True, exist_ok=True)
        drawn.savefig(file, format="svg", facecolor="white", metadata={"Date": None})


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    torch.set_num_threads(1)  # the clock is one thread's
    raise SystemExit(main())
