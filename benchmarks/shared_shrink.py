"""Would one shrink GEMM for linears that read the same input pay? (docs/decisions/0004-apply-backends.md)

    python benchmarks/shared_shrink.py

q, k, v (and gate, up) read the same x. Their down-projections and routers could be one GEMM,
x [A_q; A_k; A_v; W_q; W_k; W_v]^T, and the backward pass two. The matrices are parameters of their own, so they are
concatenated in every step.
CPU time on one thread, forward and backward, alternating; SmolLM2-135M's sizes.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

WIDTH = 576
GROUPS = {"q,k,v": (576, 192, 192), "gate,up": (1536, 1536)}


def separate(x_NI: Tensor, matrices: list[Tensor], grads: list[Tensor], dx_NI: Tensor) -> None:
    """Each linear's own GEMMs: code, gradient of the matrix, gradient of x."""
    for matrix_XI, grad_NX in zip(matrices, grads, strict=True):
        _ = x_NI @ matrix_XI.T
        dx_NI.addmm_(grad_NX, matrix_XI)
        _ = grad_NX.T @ x_NI


def together(x_NI: Tensor, matrices: list[Tensor], grads: list[Tensor], dx_NI: Tensor) -> None:
    """The same as one GEMM each."""
    matrix_XI, grad_NX = torch.cat(matrices), torch.cat(grads, dim=1)
    _ = (x_NI @ matrix_XI.T).split([len(one) for one in matrices], dim=1)
    dx_NI.addmm_(grad_NX, matrix_XI)
    _ = grad_NX.T @ x_NI


def base(x_NI: Tensor, weights: list[Tensor]) -> None:
    """The frozen layers: forward and gradient of x."""
    for weight_OI in weights:
        _ = (x_NI @ weight_OI.T) @ weight_OI


def median_ms(functions: list[Callable[[], None]], repetitions: int = 40) -> list[float]:
    """Returns the median CPU time of each, measured in turn."""
    times: list[list[float]] = [[] for _ in functions]
    for function in functions:
        function()
    for _ in range(repetitions):
        for function, taken in zip(functions, times, strict=True):
            start = time.process_time()
            function()
            taken.append((time.process_time() - start) * 1e3)
    return [statistics.median(taken) for taken in times]


def main() -> None:
    """Prints one line for each group and size."""
    torch.set_num_threads(1)
    print("group    tokens  E  r   separate  together  base   saved, of the base's time")
    for group, outputs in GROUPS.items():
        for tokens in (512, 1024):
            for experts, rank in ((1, 8), (2, 8), (8, 8), (8, 16)):
                x = torch.randn(tokens, WIDTH)
                widths = [experts * rank] * len(outputs) + ([experts] * len(outputs) if experts > 1 else [])
                matrices = [torch.randn(width, WIDTH) for width in widths]
                grads = [torch.randn(tokens, width) for width in widths]
                weights = [torch.randn(out, WIDTH) for out in outputs]
                dx = torch.zeros(tokens, WIDTH)
                apart, joined, frozen = median_ms(
                    [
                        lambda x=x, m=matrices, g=grads, d=dx: separate(x, m, g, d),
                        lambda x=x, m=matrices, g=grads, d=dx: together(x, m, g, d),
                        lambda x=x, w=weights: base(x, w),
                    ]
                )
                saved = (apart - joined) / frozen
                row = f"{group:8} {tokens:6} {experts:2} {rank:2}   {apart:7.2f}  {joined:8.2f}  {frozen:5.1f}"
                print(f"{row}   {saved:+.1%}", flush=True)


if __name__ == "__main__":
    main()
