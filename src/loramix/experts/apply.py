"""Pure functions that add the experts' delta to the output of a frozen layer: three equal ways, one oracle.

For each token with hidden state x, with gates g_e (zero for experts not chosen) and scaling s = alpha / r:

    y + s * sum_e g_e * B_e A_e x

`loop` is that equation written plainly, one expert after the other; the others must agree with it in the output and in
every gradient (tests/test_apply.py). All take and return the same:

    y_BTO        output of the frozen layer
    x_BTI        its input, after the adapter's dropout
    A_ERI, B_EOR the stacked experts
    gates_BTE    dense weights; T may be 1 where one decision serves the whole sequence
    scaling      alpha / r
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from loramix.routing import Routing

Apply = Callable[[Tensor, Tensor, Tensor, Tensor, Routing, float], Tensor]


def gates_like(x_BTI: Tensor, routing: Routing, num_experts: int) -> Tensor:
    """Returns the dense gates in the shape of x: (B, 1, E) for a sequence routing, (B, T, E) for a token routing."""
    gates_SE = routing.gates(num_experts).to(x_BTI.dtype)
    if routing.level == "sequence":
        return gates_SE[:, None, :]
    return gates_SE.reshape(x_BTI.shape[0], x_BTI.shape[1], num_experts)


def loop(y_BTO: Tensor, x_BTI: Tensor, A_ERI: Tensor, B_EOR: Tensor, routing: Routing, scaling: float) -> Tensor:
    """The reference: one expert after the other, every token through every expert. Slow, exact, any dtype."""
    gates_BTE = gates_like(x_BTI, routing, A_ERI.shape[0])
    for e in range(A_ERI.shape[0]):
        delta_BTO = (x_BTI @ A_ERI[e].T) @ B_EOR[e].T
        y_BTO = y_BTO + scaling * gates_BTE[..., e : e + 1] * delta_BTO
    return y_BTO


def concat(y_BTO: Tensor, x_BTI: Tensor, A_ERI: Tensor, B_EOR: Tensor, routing: Routing, scaling: float) -> Tensor:
    """Two GEMMs for all experts: the E * R code is gated, then projected and added to y in one addmm.

    No per-expert delta of width O exists. Costs E * R channels for every token whatever K is.
    """
    num_experts, rank, _ = A_ERI.shape
    batch, length, out = y_BTO.shape
    code_BTX = x_BTI @ A_ERI.reshape(num_experts * rank, -1).T
    if num_experts > 1:
        gates_BTE = gates_like(x_BTI, routing, num_experts)
        code_BTX = (code_BTX.view(batch, length, num_experts, rank) * gates_BTE[..., None]).flatten(-2)
    up_XO = B_EOR.permute(0, 2, 1).reshape(num_experts * rank, out)
    added = torch.addmm(y_BTO.reshape(batch * length, out), code_BTX.reshape(batch * length, -1), up_XO, alpha=scaling)
    return added.view(batch, length, out)


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
            "Use backend 'concat' or 'loop' with token routers."
        )
    weights_BK = routing.weights.to(x_BTI.dtype)
    for k in range(routing.ids.shape[1]):
        down_BRI, up_BOR = A_ERI[routing.ids[:, k]], B_EOR[routing.ids[:, k]]
        code_BTR = torch.bmm(x_BTI, down_BRI.transpose(1, 2)) * weights_BK[:, k, None, None]
        y_BTO = torch.baddbmm(y_BTO, code_BTR, up_BOR.transpose(1, 2), alpha=scaling)
    return y_BTO


BACKENDS: dict[str, Apply] = {"loop": loop, "concat": concat, "per_sequence": per_sequence}


def choose(backend: str, routing: Routing, num_experts: int) -> Apply:
    """Returns the function for a backend name; "auto" takes `concat` for one expert or token routings, else
    `per_sequence`, which costs one expert instead of E (docs/decisions/0004-apply-backends.md)."""
    if backend != "auto":
        return BACKENDS[backend]
    return per_sequence if routing.level == "sequence" and num_experts > 1 else concat
