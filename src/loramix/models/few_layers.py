"""A base with only some of its layers and random weights: what it computes means nothing, how long it takes does."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from loramix.errors import ModelError


def layer_stack(model: Any) -> str:
    """Returns the name of the list that holds a base's layers.

    Raises:
        ModelError: it has none.
    """
    decoder = model.get_decoder()
    layers = model.config.get_text_config().num_hidden_layers
    for name, module in model.named_modules():  # the outermost first: a layer may have as many experts
        inside = decoder is model or any(module is part for part in decoder.modules())
        if isinstance(module, nn.ModuleList) and len(module) == layers and inside:
            return name
    raise ModelError(f"the base has no list of {layers} layers")


def few_layers(skeleton: Any, layers: Sequence[int], dtype: torch.dtype, device: torch.device | str) -> Any:
    """Returns a base with only some of its layers, frozen, with random weights.

    The whole base is made first, so the layers that are left are those that were chosen, in whatever way its settings
    say which of them have experts, windows or no rotation.

    Args:
        skeleton: the whole base without weights (`load_skeleton`); not changed.
        layers: numbers of those that it keeps, ascending.
        dtype: of its weights.
        device: where it is made; "meta" for shapes alone.

    Raises:
        ModelError: its layers cannot be told.
    """
    model = copy.deepcopy(skeleton)
    parent, _, leaf = layer_stack(model).rpartition(".")
    stack = model.get_submodule(parent)
    kept = [getattr(stack, leaf)[number] for number in layers]
    setattr(stack, leaf, nn.ModuleList(kept))
    for place, layer in enumerate(kept):
        for module in layer.modules():
            if isinstance(getattr(module, "layer_idx", None), int):
                module.layer_idx = place
    text = model.config.get_text_config()
    for setting, value in list(vars(text).items()):  # what a forward looks up by layer, such as layer_types
        if "layer" in setting and isinstance(value, list) and len(value) == text.num_hidden_layers:
            setattr(text, setting, [value[number] for number in layers])
    text.num_hidden_layers = len(layers)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    if torch.device(device).type != "meta":
        _materialise(model, device)
    return model.requires_grad_(False)


@torch.no_grad()
def _materialise(model: Any, device: torch.device | str) -> None:
    """Gives a model on the meta device numbers; what has a rule of its own (the angles of rotary positions) by it."""
    model.to_empty(device=device)
    model.tie_weights()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.normal_(std=0.02)
        else:
            parameter.fill_(1.0)
    for module in model.modules():
        own = list(module.buffers(recurse=False))
        for buffer in own:
            buffer.zero_()
        if own:
            model._init_weights(module)
