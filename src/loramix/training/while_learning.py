"""What of a model is computed otherwise while it learns: the same numbers to rounding, in less time or memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from torch import nn

from loramix.models.lean_activations import lean_activations
from loramix.models.lean_norms import lean_norms
from loramix.models.segment_attention import segment_attention
from loramix.training.settings import TrainingSettings
from loramix.tuner.shared_inputs import shared_inputs


@contextmanager
def while_learning(model: nn.Module, settings: TrainingSettings, apart: bool) -> Iterator[None]:
    """Changes a model for the time of a stage; afterwards it is as it was.

    Args:
        model: to be trained.
        settings: of the stage.
        apart: whether its batches are long rows whose attention is each row's own.
    """
    with ExitStack() as changed:
        if apart:
            changed.enter_context(segment_attention(model))
        # The compiler joins such operations by itself, and sees no further than a module's own forward.
        if settings.lean_norms and not settings.torch_compile:
            changed.enter_context(lean_norms(model))
        if settings.lean_activations and not settings.torch_compile:
            changed.enter_context(lean_activations(model))
        changed.enter_context(shared_inputs(model, settings.shared_inputs and not settings.torch_compile))
        yield
