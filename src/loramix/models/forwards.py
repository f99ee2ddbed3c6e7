"""Modules that compute otherwise for a while: another forward on the instance, which is taken off again."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import nn


@contextmanager
def other_forwards(forwards: Mapping[nn.Module, Callable[..., Any]]) -> Iterator[None]:
    """Lets modules compute by the functions given, inside, whatever is raised there. Hooks run around them as ever.

    Args:
        forwards: by module; each takes what the module's own forward takes. For modules with `own_forward`.
    """
    for module, forward in forwards.items():
        module.forward = forward
    try:
        yield
    finally:
        for module, forward in forwards.items():
            if module.__dict__.get("forward") is forward:  # somebody else's that was put on meanwhile is theirs
                del module.forward


def own_forward(module: nn.Module) -> bool:
    """Whether a module computes by its class alone: nobody (accelerate's offloading, a kernel) has put another forward
    on it."""
    return "forward" not in module.__dict__


def is_hooked(module: nn.Module) -> bool:
    """Whether somebody looks at what goes through a module."""
    return any(
        getattr(module, kind)
        for kind in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    )
