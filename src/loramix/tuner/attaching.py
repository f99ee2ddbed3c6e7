"""Hangs a method's auxiliary losses on its training forwards, and takes them off."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from loramix.errors import ConfigError
from loramix.tuner.attached import AttachedLosses
from loramix.tuner.guide import ForwardGuide


def attach_losses(
    model: nn.Module,
    weights: Mapping[str, float] | None = None,
    *,
    accumulation: int = 1,
    kinds: Sequence[int] | None = None,
) -> AttachedLosses:
    """Lets any trainer teach a mixture's routers: their losses are added where the backward pass begins.

    The value of the loss that the trainer prints stays the language-model loss; what was added is in `.values` of what
    is returned. `MixtureTrainer` and `loramix train` add the losses themselves and refuse a model that has them.

    Args:
        model: a PeftModel, or a base with a loramix adapter that transformers added.
        weights: of the losses by name, over the method's own; 0 leaves one out.
        accumulation: micro-batches of an optimizer step (`gradient_accumulation_steps`).
        kinds: for losses that tell two kinds of data apart, the kind of each domain, 0 or 1.

    Raises:
        ConfigError: nothing to teach, or see `AttachedLosses`.
    """
    guide = _guide(model)
    mixture = None if guide is None else guide.active()
    if guide is None or mixture is None or not mixture.doors:
        raise ConfigError(
            "attach_losses: no adapter with routers is active, so there is nothing to teach. Give it the model that "
            "get_peft_model returned for a routed method."
        )
    guide.attached = AttachedLosses(mixture.config, weights, accumulation, kinds)
    return guide.attached


def detach_losses(model: nn.Module) -> None:
    """Takes attached losses off; does nothing where there are none."""
    guide = _guide(model)
    if guide is not None:
        guide.attached = None


def _guide(model: Any) -> ForwardGuide | None:
    return ForwardGuide.on(model.get_base_model() if hasattr(model, "get_base_model") else model)
