"""Activation checkpointing on a model that no trainer has seen: its layers run again in the backward."""

from __future__ import annotations

from typing import Any

from loramix.errors import ConfigError
from loramix.training.settings import TrainingSettings


def checkpoint_layers(model: Any, settings: TrainingSettings) -> None:
    """Turns activation checkpointing on where the settings ask for it, as the trainer does before its first step.

    Args:
        model: a PeftModel.
        settings: of the stage.

    Raises:
        ConfigError: the base's layers cannot run again.
    """
    if not settings.activation_checkpointing:
        return
    given = {"use_reentrant": False, **settings.activation_checkpointing_kwargs}
    own = {name: given.pop(name) for name in ("every_n_layers", "offload") if name in given}
    try:
        model.activation_checkpointing_enable(activation_checkpointing_kwargs=given, **own)
    except ValueError as error:
        raise ConfigError(
            f"activation_checkpointing: this base's layers cannot run again in the backward ({error}). Leave it out."
        ) from error
