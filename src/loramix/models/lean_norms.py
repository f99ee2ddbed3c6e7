"""RMSNorm with a frozen weight, in fewer passes over its input.

    y = w * x r,    r = 1 / sqrt(mean(x^2) + eps)
    grad x = r (w * grad y) - x r^3 mean(x * w * grad y)

transformers writes it operation by operation: six passes forward and eight backward; in half precision it keeps copies
in fp32. Here x and r are kept, as they are. The same numbers to rounding (tests/test_lean_blocks.py).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from loramix.models.forwards import other_forwards, own_forward
from loramix.precision import HALVES, keeps_types

EPSILONS = ("variance_epsilon", "eps", "epsilon")
"""What the attribute is called in the bases of transformers."""


@contextmanager
def lean_norms(model: nn.Module) -> Iterator[None]:
    """Lets a model's frozen RMSNorms compute by `rms_norm`, for the forwards and backwards inside.

    Which those are is tried, not believed: norms of w + 1, with a bias or about the mean are left as they are, and so
    are those that train, whose weight is sharded or quantised, or that somebody has given another forward.
    """
    with other_forwards({module: _Lean(module, agreed) for module in model.modules() if (agreed := _agreed(module))}):
        yield


def rms_norm(x: Tensor, weight_I: Tensor, eps: float) -> Tensor:
    """Returns w * x / sqrt(mean(x^2) + eps), (..., I); statistics of half precision are worked out in fp32.

    Args:
        x: (..., I).
        weight_I: frozen.
        eps: beside the mean square.
    """
    y: Tensor = _RMSNorm.apply(x, weight_I, eps)  # type: ignore[no-untyped-call]
    return y


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_I: Tensor, eps: float) -> Tensor:
        wide = x.float() if x.dtype in HALVES else x
        root = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
        root = root.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, root, weight_I)
        y = (wide * root).to(x.dtype)
        return y.mul_(weight_I) if torch.result_type(y, weight_I) == y.dtype else y * weight_I

    @staticmethod
    @once_differentiable
    @keeps_types
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, root, weight_I = ctx.saved_tensors
        wide = x.float() if x.dtype in HALVES else x
        grad_x = grad.to(wide.dtype) * weight_I
        along = torch.linalg.vecdot(grad_x, wide).unsqueeze(-1)
        along.mul_(root.pow(3)).div_(x.shape[-1])
        return grad_x.mul_(root).addcmul_(wide, along, value=-1).to(x.dtype), None, None


class _Lean:
    """The forward of a norm, which leaves to the module's own what has not been tried. An object, so that a copy of the
    model takes a copy of it.

    Args:
        module: the norm.
        agreed: types of input for which it has been tried.
    """

    def __init__(self, module: Any, agreed: frozenset[torch.dtype]) -> None:
        eps = _epsilon(module)
        assert eps is not None
        self.module, self.tried, self.eps, self.agreed = module, module.weight, eps, agreed

    def __call__(self, x: Any, *args: Any, **kwargs: Any) -> Any:
        if (
            torch.compiler.is_compiling()
            or args
            or kwargs
            or self.module.weight is not self.tried  # gathered from parts for this forward (FSDP), or another since
            or self.tried.requires_grad
            or type(x) is not Tensor
            or x.dtype not in self.agreed
        ):
            return type(self.module).forward(self.module, x, *args, **kwargs)
        return rms_norm(x, self.tried, self.eps)


@torch.no_grad()
def _agreed(module: nn.Module) -> frozenset[torch.dtype]:
    """Returns the types of input for which a module gives what `rms_norm` gives, on a random weight and rows of several
    sizes; none where it is no such norm or is to be left alone."""
    weight, eps = module._parameters.get("weight"), _epsilon(module)
    if eps is None or weight is None or not own_forward(module) or module._modules or module._buffers:
        return frozenset()
    if type(weight) is not nn.Parameter or weight.requires_grad or weight.dim() != 1 or len(module._parameters) > 1:
        return frozenset()
    draw = torch.Generator("cpu").manual_seed(0)
    # A stand-in, so that a trial shows in no hook and works for a base without numbers. Not by `copy`: FSDP's classes
    # make something else of that.
    stand_in: Any = object.__new__(type(module))
    stand_in.__dict__.update(module.__dict__)
    stand_in._parameters = {
        "weight": nn.Parameter(torch.randn(len(weight), generator=draw, device="cpu").to(weight.dtype), False)
    }
    sizes_N11 = torch.tensor([1.0, eps**0.5, 30.0, 1e4, 0.0])[:, None, None]
    x_N2I = (torch.randn(5, 2, len(weight), generator=draw, device="cpu") + 0.5) * sizes_N11
    kinds = (torch.float32, *HALVES)
    found = frozenset(kind for kind in kinds if _alike(stand_in, x_N2I.to(kind), eps))
    return found if torch.float32 in found else frozenset()  # half precision alone would take other norms for this one


def _alike(norm: Any, x: Tensor, eps: float) -> bool:
    wanted = rms_norm(x, norm.weight, eps)
    for mode in (True, False):
        norm.training = mode
        try:
            got = norm.forward(x)
        except (TypeError, ValueError, RuntimeError, AttributeError, IndexError):
            return False
        if type(got) is not Tensor or got.shape != wanted.shape or got.dtype != wanted.dtype:
            return False
        narrow = torch.finfo(norm.weight.dtype if norm.weight.dtype in HALVES else x.dtype)
        rounding = 2 * narrow.eps if narrow.bits == 16 else 2e-6
        if not torch.allclose(got.float(), wanted.float(), rtol=rounding, atol=1e-7):
            return False
    return True


def _epsilon(module: nn.Module) -> float | None:
    found = next((value for name in EPSILONS if isinstance(value := getattr(module, name, None), float)), None)
    return found if found is not None and found >= 0 else None
