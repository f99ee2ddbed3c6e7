"""Frozen linear layers that read the same input, and all their experts, as one autograd function.

    y_j = W_j x + b_j + s_j * sum_e g_je B_je A_je x

The experts' part is added into the layers' own output buffers, and on the way back into one gradient of x, which takes
what all the layers send. Kept for the backward pass are x, the experts' codes, the gates and, with dropout, one byte
for each number of x; nothing of the width of y. The same numbers as the plain backends (tests/test_apply.py), with less
memory and time (benchmarks/step_cost.py). How the experts' products are laid out is a `Way`: `ByChannel`, `ByRows`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from loramix.experts.dropping import left, left_
from loramix.precision import autocast_type, keeps_types, without_autocast


class Types(NamedTuple):
    """In which types products are worked out: the frozen layers', and the experts'."""

    frozen: torch.dtype
    experts: torch.dtype


class Way(Protocol):
    """How the products of stacked experts are laid out. What a code is, (N, X) or other, is the way's own business."""

    def down(self, x_NI: Tensor, downs: Sequence[Tensor]) -> Sequence[Tensor]:
        """Returns the code of each layer: what its A makes of x."""
        ...

    def weighed(self, code: Tensor, gates: Tensor | None, A_ERI: Tensor, B_EOR: Tensor) -> Tensor:
        """Returns the code as B takes it."""
        ...

    def add_up(self, out_NO: Tensor, weighed: Tensor, B_EOR: Tensor, scaling: float) -> None:
        """Adds s B weighed to a layer's output, in place."""
        ...

    def grad_up(self, grad_NO: Tensor, weighed: Tensor, B_EOR: Tensor, scaling: float) -> Tensor:
        """Returns the gradient of B."""
        ...

    def back(self, grad_NO: Tensor, B_EOR: Tensor, scaling: float) -> Tensor:
        """Returns the gradient of the weighed code."""
        ...

    def unweighed(
        self, back: Tensor, code: Tensor, gates: Tensor | None, A_ERI: Tensor, B_EOR: Tensor, wanted: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Returns the gradient of the code, and that of the gates where it is wanted."""
        ...

    def grad_down(self, backs: Sequence[Tensor], x_NI: Tensor, downs: Sequence[Tensor]) -> list[Tensor]:
        """Returns the gradient of each layer's A."""
        ...

    def back_down(self, backs: Sequence[Tensor], downs: Sequence[Tensor], into_NI: Tensor | None) -> Tensor:
        """Returns the gradient of x that comes through the experts, added in place to `into_NI` where that is given."""
        ...


@dataclass(frozen=True)
class Layer:
    """One linear layer and its experts.

    Attributes:
        A_ERI, B_EOR: the stacked experts; one of them may be shared, (1, R, I) or (1, O, R).
        gates: weights of the experts as the way takes them; None for a single expert with weight 1.
        scaling: s, of what is left after dropout.
        base_layer: the frozen layer; None where its output is given.
        y_NO: its output.
    """

    A_ERI: Tensor
    B_EOR: Tensor
    gates: Tensor | None
    scaling: float
    base_layer: nn.Linear | None = None
    y_NO: Tensor | None = None


def product_types(x: Tensor, A_ERI: Tensor) -> Types:
    """Returns the types of products: autocast's where it is on, else the operands' own."""
    low = autocast_type(x)
    return Types(x.dtype, A_ERI.dtype) if low is None else Types(low, low)


def can_fuse(base_layer: object, x: Tensor, A_ERI: Tensor) -> bool:
    """Whether the base layer's product may be computed here: a plain frozen nn.Linear without hooks, on operands that
    it takes itself, outside torch.compile, on a training pass (without gradients there is nothing to save)."""
    return (
        isinstance(base_layer, nn.Linear)
        and type(base_layer) is nn.Linear
        and type(base_layer.weight) is nn.Parameter  # no quantised or sharded weight, which have products of their own
        and torch.is_grad_enabled()
        and _fit(x, base_layer.weight, A_ERI)
        and not base_layer.weight.requires_grad
        and (base_layer.bias is None or not base_layer.bias.requires_grad)
        and not torch.compiler.is_compiling()
        and "forward" not in base_layer.__dict__  # nobody has put another on it (accelerate's offloading)
        and not (base_layer._forward_hooks or base_layer._forward_pre_hooks)
        and not (base_layer._backward_hooks or base_layer._backward_pre_hooks)
    )


def _fit(x: Tensor, weight: Tensor, A_ERI: Tensor) -> bool:
    """Whether x goes with the frozen weight: both of one type, or both such as autocast turns into its own."""
    if autocast_type(x) is not None:
        return all(one.is_floating_point() and one.dtype != torch.float64 for one in (x, weight, A_ERI))
    return x.dtype == weight.dtype


def fused(layers: Sequence[Layer], x_NI: Tensor, keep_NI: Tensor | None, way: Way) -> tuple[Tensor, ...]:
    """Returns each layer's output with its experts' part added, (N, O) each.

    Args:
        layers: that read x.
        x_NI: their input.
        keep_NI: which of its numbers the experts see, bool; None for all. What is left is scaled by the layers'
            `scaling`.
        way: of the experts' products.
    """
    tensors: list[Tensor | None] = []
    for one in layers:
        base: Any = one.base_layer
        frozen = (None, None) if base is None else (base.weight, base.bias)
        tensors += [one.y_NO, one.A_ERI, one.B_EOR, one.gates, *frozen]
    types = product_types(x_NI, layers[0].A_ERI)
    with without_autocast(x_NI):  # types are settled above
        outputs: tuple[Tensor, ...] = _Fused.apply(  # type: ignore[no-untyped-call]
            x_NI, keep_NI, way, types, tuple(one.scaling for one in layers), *tensors
        )
    return outputs


class _Fused(torch.autograd.Function):
    """For each layer six tensors: y or None, A, B, gates or None, W or None, b or None."""

    @staticmethod
    def forward(
        ctx: Any,
        x_NI: Tensor,
        keep_NI: Tensor | None,
        way: Way,
        types: Types,
        scalings: tuple[float, ...],
        *tensors: Any,
    ) -> tuple[Tensor, ...]:
        given_J, downs, ups, gates_J, weights, biases = (tensors[place::6] for place in range(6))
        read_NI, seen_NI = x_NI.to(types.frozen), left(x_NI, keep_NI).to(types.experts)
        codes = way.down(seen_NI, [down.to(types.experts) for down in downs])
        outputs = []
        for j, scaling in enumerate(scalings):
            weight_OI, bias_O, B_EOR = weights[j], biases[j], ups[j].to(types.experts)
            if weight_OI is None:
                out_NO = given_J[j].clone()
            elif bias_O is None:
                out_NO = read_NI @ weight_OI.to(types.frozen).T
            else:
                out_NO = torch.addmm(bias_O.to(types.frozen), read_NI, weight_OI.to(types.frozen).T)
            weighed = way.weighed(codes[j], _as(gates_J[j], types.experts), downs[j], B_EOR)
            sum_NO = out_NO.to(types.experts)  # itself, but for a base in fewer bits than its experts
            way.add_up(sum_NO, weighed, B_EOR, scaling)
            outputs.append(sum_NO.to(out_NO.dtype))
        ctx.save_for_backward(x_NI, keep_NI, *codes, *downs, *ups, *gates_J, *weights)
        ctx.way, ctx.types, ctx.scalings = way, types, scalings
        return tuple(outputs)

    @staticmethod
    @once_differentiable
    @keeps_types
    def backward(ctx: Any, *grads_J: Tensor) -> tuple[Tensor | None, ...]:
        way, types, count = ctx.way, ctx.types, len(ctx.scalings)
        x_NI, keep_NI, *saved = ctx.saved_tensors
        codes, downs, ups, gates_J, weights = (saved[start : start + count] for start in range(0, 5 * count, count))
        _, wanted_A, wanted_B, wanted_gates, *_ = (ctx.needs_input_grad[5 + place :: 6] for place in range(6))
        seen_NI, lows = left(x_NI, keep_NI).to(types.experts), [down.to(types.experts) for down in downs]
        grad_x: Tensor | None = None
        backs: list[Tensor] = []
        grads_up: list[Tensor | None] = []
        grads_gates: list[Tensor | None] = []
        for j, scaling in enumerate(ctx.scalings):
            grad_NO, B_EOR = grads_J[j].to(types.experts), ups[j].to(types.experts)
            gates = _as(gates_J[j], types.experts)
            of_B: Tensor | None = None
            if wanted_B[j]:
                of_B = way.grad_up(grad_NO, way.weighed(codes[j], gates, downs[j], B_EOR), B_EOR, scaling)
            grads_up.append(_as(of_B, ups[j].dtype))
            back = way.back(grad_NO, B_EOR, scaling)
            back, of_gates = way.unweighed(back, codes[j], gates, downs[j], B_EOR, wanted_gates[j])
            backs.append(back)
            grads_gates.append(None if of_gates is None else of_gates.to(gates_J[j].dtype))
            if ctx.needs_input_grad[0] and weights[j] is not None:
                weight_OI = weights[j].to(types.frozen)
                grad_x = grads_J[j] @ weight_OI if grad_x is None else grad_x.addmm_(grads_J[j], weight_OI)
        grads_down: Sequence[Tensor | None] = [None] * count
        if any(wanted_A):
            of_A = way.grad_down(backs, seen_NI, lows)
            grads_down = [grad.to(A.dtype) for grad, A in zip(of_A, downs, strict=True)]
        if ctx.needs_input_grad[0]:
            grad_x = through(way, backs, lows, keep_NI, grad_x).to(x_NI.dtype)
        of_layers: list[Tensor | None] = []
        for j in range(count):
            of_given = grads_J[j] if weights[j] is None else None
            of_layers += [of_given, grads_down[j], grads_up[j], grads_gates[j], None, None]
        return grad_x, None, None, None, None, *of_layers


def through(
    way: Way, backs: Sequence[Tensor], downs: Sequence[Tensor], keep_NI: Tensor | None, grad_NI: Tensor | None
) -> Tensor:
    """Returns the gradient of x: what came through the frozen layers, if anything did, with what comes through the
    experts added to it in place."""
    if keep_NI is None and (grad_NI is None or grad_NI.dtype == downs[0].dtype):
        return way.back_down(backs, downs, grad_NI)
    own_NI = way.back_down(backs, downs, None)
    left_(own_NI, keep_NI)
    return own_NI if grad_NI is None else grad_NI.add_(own_NI)


def _as(given: Tensor | None, kind: torch.dtype) -> Tensor | None:
    return None if given is None else given.to(kind)
