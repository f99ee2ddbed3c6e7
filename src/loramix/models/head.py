"""The language-model head only where its output is wanted: it is a fifth of a small model's work and memory."""

from __future__ import annotations

import inspect
from typing import Any

from peft import PeftModel
from torch import Tensor, nn


def head_can_choose(model: nn.Module) -> bool:
    """Whether the base can compute logits at chosen positions only (`logits_to_keep`, most transformers models)."""
    base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    return "logits_to_keep" in inspect.signature(base.forward).parameters


def logits_at(model: nn.Module, positions_P: Tensor, *, can_choose: bool, **inputs: Any) -> Tensor:
    """Returns the logits at some positions of every row, (B, P, V).

    Args:
        model: a base, a PeftModel, or either wrapped for data parallelism.
        positions_P: positions, int64 (P,).
        can_choose: from `head_can_choose` of the unwrapped model.
        **inputs: of the forward; no labels. Without a cache, unless `use_cache` is among them.
    """
    inputs.setdefault("use_cache", False)
    if can_choose:
        logits: Tensor = model(**inputs, logits_to_keep=positions_P).logits
        return logits
    logits = model(**inputs).logits
    return logits[:, positions_P]
