"""The states that a model's head reads, taken from an ordinary forward, whatever wraps the model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn

from loramix.models.head import head_can_choose
from loramix.models.larger import is_dealt_out
from loramix.precision import autocast_type


def plain_head(model: nn.Module) -> nn.Linear | None:
    """Returns a model's language-model head where it is an ordinary frozen linear behind a decoder; else None.

    Whether the model does something to the logits afterwards (soft caps, scales) cannot be seen from here.
    """
    base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    if not head_can_choose(model) or not hasattr(base, "get_decoder") or not hasattr(base, "get_output_embeddings"):
        return None
    head = base.get_output_embeddings()
    decoder = base.get_decoder()
    ordinary = type(head) is nn.Linear and type(head.weight.data) is Tensor
    # In a base in parts (FSDP2), whose head may be of a class made over nn.Linear, the head's weight is gathered by a
    # forward and kept until the backward pass, so it is whole where the loss needs it.
    in_parts = is_dealt_out(base) and nn.Linear in type(head).__mro__[:3]
    if not (ordinary or in_parts) or decoder is None or decoder is base:
        return None
    return None if any(parameter.requires_grad for parameter in head.parameters()) else head


@contextmanager
def last_states(model: nn.Module) -> Iterator[list[Tensor]]:
    """Collects the decoder's last states, (B, T, H) each, of the forwards inside, in the type in which the head will
    work: autocast's own where it is on around the forward.

    Args:
        model: a base or PeftModel with a `plain_head`, not wrapped for data parallelism.
    """
    base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    seen: list[Tensor] = []

    def take(_: nn.Module, __: Any, output: Any) -> None:
        states_BTH: Tensor = output[0] if isinstance(output, tuple) else output.last_hidden_state
        seen.append(states_BTH.to(autocast_type(states_BTH) or states_BTH.dtype))

    hook = base.get_decoder().register_forward_hook(take)
    try:
        yield seen
    finally:
        hook.remove()


def agrees(logits_BV: Tensor, states_BH: Tensor, head: nn.Linear) -> bool:
    """Returns whether a model's logits are what its head makes of its last states, and nothing more; waits for the
    device."""
    with torch.no_grad():
        kind = states_BH.dtype
        bias_V = None if head.bias is None else head.bias.to(kind)
        plain_BV = nn.functional.linear(states_BH, head.weight.to(kind), bias_V).float()
        apart = (logits_BV.float() - plain_BV).abs().max() / plain_BV.abs().max().clamp(min=1e-6)
    return bool(apart <= (1e-3 if kind == torch.float32 else 2e-2))
