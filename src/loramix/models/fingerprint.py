"""Tells bases apart without reading all of their weights."""

from __future__ import annotations

import hashlib
import json

import torch
from torch import Tensor, nn

SAMPLES = 256
"""Numbers looked at of each weight: two bases of one family, or one trained on, differ in all of them."""


def fingerprint(model: nn.Module) -> str:
    """Returns a name for a base: its configuration, and some numbers of every weight, evenly spread over it.

    Two bases that differ in single numbers of a weight may have one name.
    """
    found = hashlib.sha256()
    config = getattr(model, "config", None)
    shape = {key: value for key, value in (config.to_dict() if config is not None else {}).items() if key in _SHAPE}
    found.update(json.dumps(shape, sort_keys=True, default=str).encode())
    for name, weight in sorted(model.named_parameters()):
        flat = whole(weight.detach()).flatten()
        places = torch.linspace(0, len(flat) - 1, min(SAMPLES, len(flat)), dtype=torch.float64).long()
        found.update(f"{name} {tuple(weight.shape)} {weight.dtype}".encode())
        found.update(flat[places.to(flat.device)].to("cpu", torch.float32).numpy().tobytes())
    return found.hexdigest()[:16]


def whole(weight: Tensor) -> Tensor:
    """Returns a weight with all its parts, where it is dealt out to processes; all of them must ask."""
    gather = getattr(weight, "full_tensor", None)
    return weight if gather is None else gather()


_SHAPE = ("model_type", "hidden_size", "num_hidden_layers", "num_attention_heads", "rope_parameters", "rms_norm_eps")
