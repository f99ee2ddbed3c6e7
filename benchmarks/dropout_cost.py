"""What does dropout on the experts' input cost, beside torch's own?

    OMP_NUM_THREADS=1 python benchmarks/dropout_cost.py [--tokens 1376] [--p 0.05] [--rounds 15] [--bf16] [--json]

The inputs of the built-in base's linear layers, forward and backward. `torch` is `nn.Dropout` and its autograd.
`loramix` is what the functions do in which the experts ride (`experts/fused.py`): one byte drawn for each number,
what is left of x made in the forward and once more in the backward, and the gradient without what was dropped; the
scale is in the experts' products. The two take turns, CPU time of the thread, ratios within a round, medians. Kept is
what is held between forward and backward beside x itself.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from loramix.environment import environment
from loramix.experts.dropping import InputDropout, left, left_

WIDTHS = (576, 1536)
"""What the built-in base's linear layers read."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--tokens", type=int, default=1376)
    parser.add_argument("--p", type=float, default=0.05)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--json", action="store_true")
    asked = parser.parse_args()
    dtype = torch.bfloat16 if asked.bf16 else torch.float32
    rows = [compared(asked.tokens, width, asked.p, dtype, asked.rounds) for width in WIDTHS]
    if asked.json:
        print(json.dumps({"environment": environment(), "threads": torch.get_num_threads(), "rows": rows}, indent=2))
        return 0
    for row in rows:
        print(
            f"({row['tokens']}, {row['width']}) {row['dtype']}: torch {row['torch_ms']:.2f} ms, loramix "
            f"{row['loramix_ms']:.2f} ms, ratio {row['ratio']:.2f} ({row['least']:.2f} to {row['most']:.2f}); kept "
            f"{row['torch_kept']:.1f} and {row['loramix_kept']:.1f} bytes a number"
        )
    return 0


def compared(tokens: int, width: int, p: float, dtype: torch.dtype, rounds: int) -> dict[str, Any]:
    """Returns both sides' milliseconds and bytes kept for an input of (tokens, width)."""
    x, gradient = torch.randn(2, tokens, width, dtype=dtype)
    sides = {"torch": of_torch(p), "loramix": of_loramix(p)}
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    kept: dict[str, int] = {}
    for number in range(rounds + 1):
        for name in sorted(sides, reverse=bool(number % 2)):
            begun = time.thread_time_ns()
            kept[name] = sides[name](x, gradient.clone())
            if number:  # the first round warms up
                seconds[name].append((time.thread_time_ns() - begun) / 1e9)
    ratios = [ours / theirs for ours, theirs in zip(seconds["loramix"], seconds["torch"], strict=True)]
    return {
        "tokens": tokens,
        "width": width,
        "dtype": str(dtype).removeprefix("torch."),
        **{f"{name}_ms": median(found) * 1e3 for name, found in seconds.items()},
        **{f"{name}_kept": size / x.numel() for name, size in kept.items()},
        "ratio": median(ratios),
        "least": min(ratios),
        "most": max(ratios),
    }


def of_torch(p: float) -> Callable[[Tensor, Tensor], int]:
    """Returns what drops numbers of x and of a gradient by nn.Dropout, and says the bytes kept in between."""
    dropout = nn.Dropout(p).train()

    def run(x: Tensor, gradient: Tensor) -> int:
        x = x.detach().requires_grad_()
        kept: dict[int, int] = {}

        def pack(one: Tensor) -> Tensor:
            kept[one.untyped_storage().data_ptr()] = one.untyped_storage().nbytes()
            return one

        with saved_tensors_hooks(pack, lambda one: one):
            out = dropout(x)
        out.backward(gradient)
        return sum(kept.values())

    return run


def of_loramix(p: float) -> Callable[[Tensor, Tensor], int]:
    """Returns the same in the form in which the experts' functions do it."""
    dropout = InputDropout(p).train()

    def run(x: Tensor, gradient: Tensor) -> int:
        keep = dropout.draw(x)
        assert keep is not None
        left(x, keep)  # for the codes
        left(x, keep)  # for the gradient of A
        left_(gradient, keep)
        return keep.untyped_storage().nbytes()

    return run


if __name__ == "__main__":
    raise SystemExit(main())
