"""The gated activation of a feed-forward block, silu(gate) * up, with two tensors kept for the backward, not three.

silu(gate) is worked out again in the backward pass. The products before and after it are the block's own modules,
called as its own forward calls them, so experts, hooks and copies by expert go through as ever. The same numbers
bit for bit (tests/test_lean_blocks.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from loramix.models.forwards import is_hooked, other_forwards, own_forward

PROJECTIONS = ("gate_proj", "up_proj", "down_proj")


@contextmanager
def lean_activations(model: nn.Module) -> Iterator[None]:
    """Lets a model's blocks of down(silu(gate(x)) * up(x)) compute by `silu_times`, for the forwards and backwards
    inside. Which blocks those are is tried, not believed; others are left as they are."""
    with other_forwards({module: _Lean(module) for module in model.modules() if _is_gated_by_silu(module)}):
        yield


def silu_times(gate: Tensor, up: Tensor) -> Tensor:
    """Returns silu(gate) * up, (..., F).

    Args:
        gate, up: (..., F), of one shape and type.
    """
    inner: Tensor = _SiluTimes.apply(gate, up)  # type: ignore[no-untyped-call]
    return inner


class _SiluTimes(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return nn.functional.silu(gate).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        gate, up = ctx.saved_tensors
        grad_up = nn.functional.silu(gate).mul_(grad) if ctx.needs_input_grad[1] else None
        if not ctx.needs_input_grad[0]:
            return None, grad_up
        grad_gate = grad * up
        torch.ops.aten.silu_backward.grad_input(grad_gate, gate, grad_input=grad_gate)
        return grad_gate, grad_up


class _Lean:
    """The forward of a block. An object, so that a copy of the model takes a copy of it."""

    def __init__(self, block: Any) -> None:
        self.block = block

    def __call__(self, x: Any, *args: Any, **kwargs: Any) -> Any:
        block = self.block
        if torch.compiler.is_compiling() or args or kwargs:
            return type(block).forward(block, x, *args, **kwargs)
        gate, up = block.gate_proj(x), block.up_proj(x)
        # One of them may have a copy for each expert and the other not.
        plain = type(gate) is Tensor and type(up) is Tensor and gate.dtype == up.dtype and gate.shape == up.shape
        return block.down_proj(silu_times(gate, up) if plain else nn.functional.silu(gate) * up)


@torch.no_grad()
def _is_gated_by_silu(block: nn.Module) -> bool:
    """Whether a block's own forward gives down(silu(gate(x)) * up(x)), with stand-ins for its three projections."""
    children = dict(block._modules)
    projections = [children.pop(name, None) for name in PROJECTIONS]
    if None in projections or not own_forward(block) or block._parameters or block._buffers:
        return False
    others = [one for child in children.values() if child is not None for one in child.modules()]
    if any(is_hooked(one) or not own_forward(one) or one._parameters for one in others):
        return False  # whoever looks at the activation would see it no more
    draw = torch.Generator("cpu").manual_seed(0)
    x, gate, up = (3 * torch.randn(6, 4, 4, generator=draw, device="cpu") for _ in range(3))
    # Blocks that clamp one of the two (at 7, 10 or 16) are others: large numbers of both signs, in each and in both.
    gate *= torch.tensor([1.0, 1.0, 1e2, 1e2, 1e4, 1e4])[:, None, None]
    up *= torch.tensor([1.0, 1e4, 1.0, 1e2, 1.0, 1e4])[:, None, None]
    down = _Gives(lambda given: 2 * given + 1)
    trial: Any = object.__new__(type(block))  # not by `copy`: FSDP's classes make something else of that
    trial.__dict__.update(block.__dict__)
    trial._modules = {**children, **dict(zip(PROJECTIONS, (_Gives(gate), _Gives(up), down), strict=True))}
    wanted = 2 * (nn.functional.silu(gate) * up) + 1
    before = [(one, one.training) for one in others]
    try:
        for mode in (True, False):
            trial.train(mode)
            got = trial.forward(x)
            read_x = all(trial._modules[name].seen is x for name in PROJECTIONS[:2])
            if not read_x or type(got) is not Tensor or not torch.equal(got, wanted):
                return False
    except (TypeError, ValueError, RuntimeError, AttributeError, IndexError):
        return False
    finally:
        for one, training in before:
            one.training = training
    return True


class _Gives(nn.Module):
    """Stands in for a projection: gives what it is told, and remembers what it was given."""

    def __init__(self, gives: Tensor | Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.gives = gives
        self.seen: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        self.seen = x
        return self.gives if isinstance(self.gives, Tensor) else self.gives(x)
