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

    Nothing else changes: a module whose input turns out to be another one works for itself.

    Args:
        model: a PeftModel, or a base with adapters.
        wanted: false changes nothing.
    """
    groups = _groups(model) if wanted else []
    for first, *others in groups:
        first.followers = tuple(others)
    try:
        yield
    finally:
        for first, *_ in groups:
            first.followers = ()
            first.context.ahead.clear()


def _groups(model: nn.Module) -> list[list[LoramixLinear]]:
    """Returns the modules that read the very same tensor one right after the other."""
    adapted = [module for module in model.modules() if isinstance(module, LoramixLinear)]
    if not adapted:
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
    device = base.get_input_embeddings().weight.device
    try:
        for module in adapted:
            module._disable_adapters = True
        with torch.no_grad():
            base(input_ids=torch.zeros(1, 4, dtype=torch.int64, device=device), use_cache=False)
    except (TypeError, ValueError, RuntimeError, KeyError, IndexError):
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
