"""Reads the prompts of a stage once, before it begins, where each would be read in every epoch.

A router that reads the base alone takes in the same of a prompt whatever has been learned: the base is frozen. Read in
each step that is a fifth of MoA's training; read once, in a fixed order, it is the same for a run that was resumed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from loramix.data.collation import Example
from loramix.training.prompt_states import prompt_states
from loramix.training.settings import TrainingSettings
from loramix.tuner.guide import ForwardGuide

MOST_BYTES = 1 << 30
"""What the states may take; where there are more, each step reads its own prompts."""


def read_ahead(
    model: Any, examples: Sequence[Example], settings: TrainingSettings, processes: int, pad_token_id: int
) -> dict[str, Tensor] | None:
    """Returns what the routers take in of each example's prompt, fp32 (N, I) by scope; None where it does not pay.

    Args:
        model: to be trained.
        examples: of the stage, in their places.
        settings: say how often each is seen.
        processes: that train together.
        pad_token_id: of the base.
    """
    if not (settings.read_ahead and reads_base(model)):
        return None
    rows = settings.per_device_train_batch_size * settings.gradient_accumulation_steps * processes
    seen = settings.max_steps * rows if settings.max_steps > 0 else settings.num_train_epochs * len(examples)
    if seen <= len(examples) or _bytes(model, len(examples)) > MOST_BYTES:
        return None
    prompts = [(e.encoded.input_ids[: e.encoded.prompt_length], e.domain_id) for e in examples]
    return prompt_states(model, prompts, pad_token_id=pad_token_id)


def reads_base(model: nn.Module) -> bool:
    """Returns whether a model has routers that take in what its base alone makes of prompts."""
    mixture = _mixture(model)
    return mixture is not None and mixture.settled_by == "prompt" and mixture.reads_base and bool(mixture.doors)


def _bytes(model: nn.Module, examples: int) -> int:
    mixture = _mixture(model)
    assert mixture is not None
    return 4 * examples * sum(door.in_features for door in mixture.doors.values())


def _mixture(model: Any) -> Any:
    guide = ForwardGuide.on(model.get_base_model()) if hasattr(model, "get_base_model") else None
    return None if guide is None else guide.active()
