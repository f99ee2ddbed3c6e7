"""Adapted modules that read the same input (q, k, v; gate, up) work it out together: the first of them runs for all.

Their experts' down-projections are one product then, the input has one gradient instead of a sum of several, and with
dropout one mask. Which modules these are is not guessed from names: the base is run on a few tokens, and looked at.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import groupby
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from loramix.tuner.layer import LoramixLinear


@contextmanager
def shared_inputs(model: nn.Module, wanted: bool = True) -> Iterator[None]:
    """Lets modules that read the same input run together, in the training forwards inside.

    A module whose input turns out to be another one works for itself. To find out who reads the same, the base is run
    once, with the hooks that are on it; not where an adapter is merged into it, nor where layers run again in a
    reentrant backward, whose forward has no gradients and would drop other numbers.

    Args:
        model: a PeftModel, or a base with adapters.
        wanted: false changes nothing.
    """
    groups = _groups(model) if wanted else []
    before = [first.followers for first, *_ in groups]
    for first, *others in groups:
        first.followers = tuple(others)
    try:
        yield
    finally:
        for (first, *_), own in zip(groups, before, strict=True):
            first.followers = own
            first.context.ahead.clear()


def _groups(model: nn.Module) -> list[list[LoramixLinear]]:
    """Returns the modules that read the very same tensor one right after the other."""
    adapted = [module for module in model.modules() if isinstance(module, LoramixLinear)]
    if not adapted or any(module.merged for module in adapted) or _runs_again_reentrantly(model):
        return []
    base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    seen: list[tuple[LoramixLinear, Tensor]] = []

    def look(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        assert isinstance(module, LoramixLinear)
        seen.append((module, inputs[0]))

    training = [module for module in model.modules() if module.training]
    hooks: list[RemovableHandle] = [module.register_forward_pre_hook(look) for module in adapted]
    before = [module.disable_adapters for module in adapted]
    model.eval()
    try:
        device = base.get_input_embeddings().weight.device
        for module in adapted:
            module._disable_adapters = True
        with torch.no_grad():
            base(input_ids=torch.zeros(1, 4, dtype=torch.int64, device=device), use_cache=False)
    except (TypeError, ValueError, RuntimeError, KeyError, IndexError, AttributeError, AssertionError):
        return []
    finally:
        for module, off in zip(adapted, before, strict=True):
            module._disable_adapters = off
        for hook in hooks:
            hook.remove()
        for one in training:
            one.training = True
    if len({id(module) for module, _ in seen}) != len(seen):
        return []  # a module that runs twice may read something else the second time
    runs = (list(run) for _, run in groupby(seen, key=lambda pair: id(pair[1])))
    return [[module for module, _ in run] for run in runs if len(run) > 1]


def _runs_again_reentrantly(model: nn.Module) -> bool:
    functions = [
        getattr(module, "_gradient_checkpointing_func", None)
        for module in model.modules()
        if getattr(module, "gradient_checkpointing", False)
    ]
    return any(getattr(function, "keywords", {}).get("use_reentrant", False) for function in functions)
