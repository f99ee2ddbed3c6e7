"""Equal ways of adding the routed experts' delta to a frozen layer's output.

    y = y0 + s * sum_e gates[e] * B_e A_e x

`loop` is the reference: the equation written plainly, one expert after the other; the others must agree with it in the
output and in every gradient (tests/test_apply.py). All take and return the same:

    y_BTO        output of the frozen layer
    x_BTI        its input, after the adapter's dropout
    A_ERI, B_EOR the stacked experts; one of the two may be shared by all experts, (1, R, I) or (1, O, R)
    routing      weights by token, or one decision for a whole sequence
    scaling      s, alpha / r
"""

from __future__ import annotations

import torch
from torch import Tensor

from loramix.experts.by_channel import add_up, gated
from loramix.experts.by_segment import by_segment
from loramix.experts.faster import Apply, Shape, fastest
from loramix.experts.fused import product_types
from loramix.experts.grouped import fits, grouped
from loramix.routing import Routing

CONCAT_UP_TO = 192
"""E * R up to which all experts' channels for every token cost less than sorting tokens by expert, where that is not
measured. Found on a processor at top 2 (benchmarks/step_cost.py): even at 128 to 256."""
ROWS_FROM = 128
"""E * R from which, in autocast on a processor, rows go through their own experts one by one: below, all experts'
channels for every token cost less than many small products in 16 bits (at 64: 0.83 of the step; docs/log.md)."""
MEASURED = range(65, 4097)
"""E * R between which either may be the faster one (on GPUs peers' figures put the crossing at 300 to 1600)."""


def gates_like(x_BTI: Tensor, routing: Routing, num_experts: int, dtype: torch.dtype | None = None) -> Tensor:
    """Returns the dense gates in the shape of x: (B, 1, E) for a sequence routing, (B, T, E) for a token routing; in
    x's type if no other is asked for."""
    gates_SE = routing.gates(num_experts).to(dtype or x_BTI.dtype)
    if routing.level == "sequence" and routing.segments is not None:
        return routing.segments.spread(gates_SE)[None]
    if routing.level == "sequence":
        return gates_SE[:, None, :]
    return gates_SE.reshape(x_BTI.shape[0], x_BTI.shape[1], num_experts)


def gates_by_token(
    x_BTI: Tensor, routing: Routing, num_experts: int, dtype: torch.dtype | None = None
) -> Tensor | None:
    """Returns the dense gates by token, (N, E), as `gates_like`; None for a single expert, whose weight is 1."""
    if num_experts == 1 and routing.logits is None:
        return None
    gates = gates_like(x_BTI, routing, num_experts, dtype)
    return gates.expand(x_BTI.shape[0], x_BTI.shape[1], num_experts).reshape(-1, num_experts)


def loop(y_BTO: Tensor, x_BTI: Tensor, A_ERI: Tensor, B_EOR: Tensor, routing: Routing, scaling: float) -> Tensor:
    """The reference: one expert after the other, every token through every expert. Slow, exact, any dtype."""
    num_experts = max(A_ERI.shape[0], B_EOR.shape[0])
    gates_BTE = gates_like(x_BTI, routing, num_experts)
    for e in range(num_experts):
        down_RI, up_OR = A_ERI[e % A_ERI.shape[0]], B_EOR[e % B_EOR.shape[0]]
        y_BTO = y_BTO + scaling * gates_BTE[..., e : e + 1] * ((x_BTI @ down_RI.T) @ up_OR.T)
    return y_BTO


def concat(y_BTO: Tensor, x_BTI: Tensor, A_ERI: Tensor, B_EOR: Tensor, routing: Routing, scaling: float) -> Tensor:
    """Two GEMMs for all experts: the E * R code is gated, then projected and added to y in one addmm.

    No per-expert delta of width O exists. Costs E * R channels for every token whatever K is. No data-dependent shapes,
    so torch.compile takes it whole. A shared A gives one code for all experts, a shared B takes the sum of their codes.
    """
    out = y_BTO.shape[-1]
    gates_NE = gates_by_token(x_BTI, routing, max(A_ERI.shape[0], B_EOR.shape[0]))
    code_NX = x_BTI.reshape(-1, x_BTI.shape[-1]) @ A_ERI.flatten(0, 1).T
    gated_NX = gated(code_NX, gates_NE, A_ERI.shape[0], B_EOR.shape[0])
    return add_up(y_BTO.reshape(-1, out), gated_NX, B_EOR, scaling).view(y_BTO.shape)


def per_sequence(
    y_BTO: Tensor, x_BTI: Tensor, A_ERI: Tensor, B_EOR: Tensor, routing: Routing, scaling: float
) -> Tensor:
    """Gathers the chosen experts of each row and multiplies them in a batch: cost K * R, whatever E is.

    Raises:
        ValueError: the routing is by token; its rows do not share experts.
    """
    if routing.level != "sequence":
        raise ValueError(
            "backend 'per_sequence' was given a routing by token. Expected one decision per sequence. "
            "Use backend 'concat', 'grouped' or 'loop' with token routers."
        )
    weights_BK, ids_BK = routing.weights.to(x_BTI.dtype), routing.chosen()
    if routing.segments is not None:
        return by_segment(y_BTO, x_BTI, A_ERI, B_EOR, routing, scaling)
    for k in range(ids_BK.shape[1]):
        down_BRI = A_ERI[ids_BK[:, k]] if A_ERI.shape[0] > 1 else A_ERI.expand(len(ids_BK), -1, -1)
        up_BOR = B_EOR[ids_BK[:, k]] if B_EOR.shape[0] > 1 else B_EOR.expand(len(ids_BK), -1, -1)
        code_BTR = torch.bmm(x_BTI, down_BRI.transpose(1, 2)) * weights_BK[:, k, None, None]
        y_BTO = torch.baddbmm(y_BTO, code_BTR, up_BOR.transpose(1, 2), alpha=scaling)
    return y_BTO


BACKENDS: dict[str, Apply] = {"loop": loop, "concat": concat, "per_sequence": per_sequence, "grouped": grouped}


def _on_processor(A_ERI: Tensor) -> bool:
    """Whether rows are gone through on a processor; shapes alone stand for the device that would train."""
    return A_ERI.device.type == "cpu" or (A_ERI.is_meta and not torch.accelerator.is_available())


def _narrow_in_autocast(width: int) -> bool:
    return width < ROWS_FROM and torch.is_autocast_enabled("cpu")


def choose(backend: str, routing: Routing, A_ERI: Tensor, B_EOR: Tensor) -> str:
    """Returns the name of the backend for these experts and this routing.

    "auto": `per_sequence` where a sequence has fewer experts than there are (rows that lie one after the other: on a
    processor only, and in autocast with wide experts only; elsewhere their tokens are routed one by one); where each
    token has few experts and grouped_mm takes the sizes, `concat` for narrow experts, `grouped` for wide ones, and
    between what was measured to be faster on this device (docs/decisions/0004-apply-backends.md).
    """
    if backend != "auto":
        return backend
    num_experts, rank = max(A_ERI.shape[0], B_EOR.shape[0]), A_ERI.shape[1]
    chosen = routing.weights.shape[1]
    # Rows that lie one after the other are gone through one by one, which an accelerator would wait for.
    by_rows = routing.segments is None or (_on_processor(A_ERI) and not _narrow_in_autocast(num_experts * rank))
    if routing.level == "sequence" and by_rows:
        return "per_sequence" if chosen < num_experts else "concat"
    dtype = product_types(A_ERI, A_ERI).experts
    sparse = chosen * 4 <= num_experts and fits(rank, A_ERI.shape[2], B_EOR.shape[1], dtype)
    if not sparse or torch.compiler.is_compiling():
        return "concat"
    width, faster = num_experts * rank, None
    if width in MEASURED and not A_ERI.is_meta:
        shape = Shape(str(A_ERI.device), str(dtype), tuple(A_ERI.shape), tuple(B_EOR.shape), chosen)
        faster = fastest(shape, (("concat", concat), ("grouped", grouped)))
    return faster or ("grouped" if width > CONCAT_UP_TO else "concat")
