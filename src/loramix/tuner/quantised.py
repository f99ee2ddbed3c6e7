"""Quantised bases: which of them cannot be trained through, said before the first step."""

from __future__ import annotations

from torch import nn

from loramix.errors import ModelError


def refuse_without_gradient(model: nn.Module) -> None:
    """Refuses to train through layers that pass no gradient on.

    On a CPU, bitsandbytes' 4-bit layer packs its weights at the first forward in evaluation mode for a kernel that has
    no backward (0.50, seen on 2026-11-23): its input gets no gradient, without a word, and all experts below it learn
    from what is left. Answering works.

    Raises:
        ModelError: there is such a layer.
    """
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if type(module).__name__ == "Linear4bit" and weight is not None and weight.device.type == "cpu":
            raise ModelError(
                f"{name} is a 4-bit layer of bitsandbytes on a CPU, which passes no gradient on: the experts below it "
                "would not learn. Train on a GPU, or load the base in 8 bits (bitsandbytes, or torchao's int8 weights)."
            )
