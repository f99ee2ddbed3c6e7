"""Where a training step's time goes: each operation timed, and told apart by its shapes and by what it ran in."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from training_step import TrainingStep

PARTS = ("base GEMM", "attention", "head", "adapter", "router", "base, other", "optimizer", "data", "framework")
PRODUCTS = {"aten::mm", "aten::addmm", "aten::addmm_", "aten::bmm", "aten::baddbmm", "aten::_grouped_mm"}
OURS = {"loramix.experts": "adapter", "loramix.losses": "head"}
"""Parts by the module whose autograd functions run in them."""
PLACES = {
    "loramix_bank": ("adapter", ("expand", "contract", "each_output", "sampled_outputs")),
    "loramix_router": ("router", ("forward", "pool")),
}
"""Parts by the modules that run in them, and what is called of these. In autocast there is not always a function of
ours around the experts, and they and the routers have casts of their own: no shape would tell these from the base's."""


class Stopwatch(TorchDispatchMode):
    """Times every operation of the calling thread, forward and backward, in the thread's CPU time. Looking at the clock
    adds about two microseconds to each.

    Args:
        step: whose base, experts and head tell the parts apart.

    Attributes:
        seconds: by part.
        inside: of which part is the function of ours that is running, the innermost last.
        calling: of which part is the module of ours that is running, likewise.
        made: of which part each autograd node is that our modules made, by the node's number.
    """

    def __init__(self, step: TrainingStep, base: Any) -> None:
        super().__init__()
        self.seconds: Counter[str] = Counter()
        self.inside: list[str] = []
        self.calling: list[str] = []
        self.made: dict[int, str] = {}
        self._weights, self._words = base_shapes(base), base.config.vocab_size
        self._experts = {bank.num_experts for bank in banks(step)} - {1}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        begun = time.thread_time_ns()
        out = func(*args, **(kwargs or {}))
        self.seconds[self._part(func, args, out)] += (time.thread_time_ns() - begun) / 1e9
        return out

    def _part(self, func: Any, args: Any, out: Any) -> str:
        name = func.name().split(".")[0]
        if "scaled_dot_product" in name:
            return "attention"
        if "head" in self.inside:
            return "head"
        shapes = [tuple(one.shape) for one in args if isinstance(one, Tensor)]
        if name in PRODUCTS and any(shape in self._weights for shape in shapes[-2:]):
            return "base GEMM"
        if self.inside:
            return self.inside[-1]
        made = [tuple(out.shape)] if isinstance(out, Tensor) else []
        if name != "aten::embedding" and any(self._words in shape for shape in [*shapes, *made]):
            return "head"
        # By token, (N, E) or (1, N, E); not a stack of experts whose rank is as large as their number.
        routed = any(
            one[-1:] and one[-1] in self._experts and len(one) - (one[0] == 1) == 2 for one in [*shapes, *made]
        )
        return "router" if routed or name in ("aten::topk", "aten::_softmax") else self._place()

    def _place(self) -> str:
        """Returns the part whose modules are running, or made the autograd node that is running."""
        if self.calling:
            return self.calling[-1]
        node = torch._C._current_autograd_node()
        return self.made.get(node._sequence_nr(), "base, other") if node is not None else "base, other"


@contextmanager
def named_functions(watch: Stopwatch) -> Iterator[None]:
    """Lets a stopwatch know which of our autograd functions is running; they are as they were afterwards."""
    changed: list[tuple[type, str, Any]] = []
    for function in torch.autograd.Function.__subclasses__():
        part = next((part for module, part in OURS.items() if function.__module__.startswith(module)), None)
        for way in ("forward", "backward") if part else ():
            changed.append((function, way, function.__dict__[way]))
            setattr(function, way, staticmethod(_within(watch.inside, str(part), getattr(function, way))))
    try:
        yield
    finally:
        for function, way, true in changed:
            setattr(function, way, true)


@contextmanager
def known_places(watch: Stopwatch, model: nn.Module) -> Iterator[None]:
    """Lets a stopwatch know which of our modules is running, and which nodes of the backward it made; the modules are
    as they were afterwards."""
    changed: list[tuple[nn.Module, str]] = []
    for module in model.modules():
        if hasattr(module, "loramix_bank"):  # its experts and those of modules that it runs for
            module.__dict__["_added"] = _noting(watch, "adapter", module._added)
            changed.append((module, "_added"))
        for attribute, (part, names) in PLACES.items():
            for own in getattr(module, attribute, {}).values():
                for name in names:
                    if hasattr(own, name):
                        own.__dict__[name] = _noting(watch, part, getattr(own, name))
                        changed.append((own, name))
    try:
        yield
    finally:
        for own, name in changed:
            del own.__dict__[name]


def _noting(watch: Stopwatch, part: str, run: Callable[..., Any]) -> Callable[..., Any]:
    def noted(*args: Any, **kwargs: Any) -> Any:
        watch.calling.append(part)
        first = torch.autograd._get_sequence_nr()
        try:
            return run(*args, **kwargs)
        finally:
            watch.calling.pop()
            for number in range(first, torch.autograd._get_sequence_nr()):
                watch.made.setdefault(number, part)  # the innermost returns first

    return noted


def _within(inside: list[str], part: str, run: Callable[..., Any]) -> Callable[..., Any]:
    def watched(*args: Any) -> Any:
        inside.append(part)
        try:
            return run(*args)
        finally:
            inside.pop()

    return watched


def base_shapes(base: Any) -> set[tuple[int, int]]:
    """Returns the shapes of the frozen weights of the linear layers, either way round."""
    linears = [one for name, one in base.named_modules() if isinstance(one, nn.Linear) and "lm_head" not in name]
    sizes = {(one.out_features, one.in_features) for one in linears}
    return sizes | {(inputs, outputs) for outputs, inputs in sizes}


def banks(step: TrainingStep) -> list[Any]:
    """Returns the experts of each adapted module."""
    return [one.loramix_bank["default"] for one in step.model.modules() if hasattr(one, "loramix_bank")]


def parts_of(step: TrainingStep, base: Any) -> dict[str, float]:
    """Takes one step and returns its CPU seconds by part, what no operation took (Python, autograd) left out."""
    begun = time.thread_time()
    batch = step.batch()
    data = time.thread_time() - begun
    watch = Stopwatch(step, base)
    with named_functions(watch), known_places(watch, step.model), watch:
        step.learn(batch)
    begun = time.thread_time()
    step.update()
    found = dict.fromkeys(PARTS, 0.0) | dict(watch.seconds)
    return found | {"optimizer": time.thread_time() - begun, "data": data}


def plain_seconds(step: TrainingStep) -> float:
    """Takes one step with nothing watching and returns its CPU seconds."""
    begun = time.thread_time()
    step()
    return time.thread_time() - begun
