"""Attention of rows that lie one after the other in one long row, each to itself, at the cost of the rows alone.

transformers builds a mask of N x N for such a batch, and a CPU multiplies out all of it. Here each row's attention is
worked out on its own by torch's scaled_dot_product_attention: the same numbers, no mask. On accelerators
the base's own attention is left as it is: flash attention reads the same borders.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from loramix.models.half_attention import attends_in_halves, half_attention
from loramix.segments import BORDERS

NAME = "loramix_segments"
KNOWN_LAYERS = {"full_attention", "sliding_attention"}


@contextmanager
def segment_attention(model: nn.Module) -> Iterator[None]:
    """Makes a model on a CPU whose attention is torch's attend within the rows of a long row, for the forwards and
    backwards inside; other models and devices stay as they are."""
    configs = {id(config): config for module in model.modules() if (config := getattr(module, "config", None))}
    changed = [
        config
        for config in configs.values()
        if getattr(config, "_attn_implementation", None) == "sdpa" and _device(model) == "cpu"
    ]
    if changed:
        AttentionInterface.register(NAME, _attention)
        AttentionMaskInterface.register(NAME, _mask)
    for config in changed:
        config._attn_implementation = NAME
    try:
        yield
    finally:
        for config in changed:
            config._attn_implementation = "sdpa"


@torch.no_grad()
def keeps_segments_apart(model: nn.Module) -> bool:
    """Returns whether a base gives two short rows in one long row the states it gives them alone. Tried, not believed:
    learned absolute positions, state-space layers and other attentions differ.

    Args:
        model: a base, or a PeftModel whose adapters are left out of it.
    """
    base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    if isinstance(model, PeftModel) and any(one.is_prompt_learning for one in model.peft_config.values()):
        return False  # virtual tokens belong before each row, and PEFT puts them before the first
    config = base.config.get_text_config()
    if not set(getattr(config, "layer_types", None) or []) <= KNOWN_LAYERS:
        return False
    device, words = base.get_input_embeddings().weight.device, config.vocab_size
    rows = [torch.arange(1, 5, device=device) % words, torch.arange(7, 10, device=device) % words]
    long_row, places = torch.cat(rows)[None], torch.cat([torch.arange(len(row), device=device) for row in rows])[None]
    borders = torch.tensor([0, len(rows[0]), long_row.shape[1]], dtype=torch.int32, device=device)
    told = dict(zip(BORDERS, (borders, borders, len(rows[0]), len(rows[0])), strict=True))
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with _without_adapters(model), segment_attention(model):
            together = base(input_ids=long_row, position_ids=places, use_cache=False, **told).logits[0]
            alone = torch.cat([base(input_ids=row[None], use_cache=False).logits[0] for row in rows])
    except (TypeError, ValueError, RuntimeError, KeyError, IndexError):
        return False
    finally:
        for module in training:
            module.training = True
    apart = (together.float() - alone.float()).abs().max() / alone.float().abs().max().clamp(min=1e-6)
    return bool(apart <= (1e-3 if alone.dtype == torch.float32 else 5e-2))


@contextmanager
def _without_adapters(model: nn.Module) -> Iterator[None]:
    """Leaves adapters out. PEFT lets all of them require gradients afterwards; what did not before still does not."""
    frozen = [parameter for parameter in model.parameters() if not parameter.requires_grad]
    with model.disable_adapter() if isinstance(model, PeftModel) else nullcontext():
        yield
    for parameter in frozen:
        parameter.requires_grad_(False)


def _device(model: nn.Module) -> str:
    return next((parameter.device.type for parameter in model.parameters()), "cpu")


def _mask(*args: Any, attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor | None:
    """No mask for a long row; torch's where rows are padded."""
    if attention_mask is None:
        return None
    mask: Tensor | None = sdpa_mask(*args, attention_mask=attention_mask, **kwargs)
    return mask


def _attention(
    module: nn.Module,
    query_1HND: Tensor,
    key_1GND: Tensor,
    value_1GND: Tensor,
    attention_mask: Tensor | None,
    cu_seq_lens_q: Tensor | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention by transformers' interface, row by row; a batch without borders goes to torch's as it is."""
    if cu_seq_lens_q is None:
        return sdpa_attention_forward(module, query_1HND, key_1GND, value_1GND, attention_mask, **kwargs)
    lengths = cu_seq_lens_q.diff().tolist()
    parts = []
    apart = (torch.split(one, lengths, dim=2) for one in (query_1HND, key_1GND, value_1GND))
    for query, key, value in zip(*apart, strict=True):
        mask = _band(query.shape[2], sliding_window, query.device)
        if mask is None and _plainly_causal(module, kwargs) and attends_in_halves(query, key, value):
            parts.append(half_attention(query, key, value, kwargs.get("scaling")).transpose(1, 2))
        else:
            parts.append(sdpa_attention_forward(module, query, key, value, mask, **kwargs)[0])
    return torch.cat(parts, dim=1), None


def _plainly_causal(module: nn.Module, asked: dict[str, Any]) -> bool:
    """Whether no more is asked of an attention than to be causal, and scaled."""
    causal = asked.get("is_causal")
    more = any(asked.get(name) is not None for name in ("position_bias", "softcap", "cache", "s_aux"))
    return bool(getattr(module, "is_causal", True) if causal is None else causal) and not (more or asked.get("dropout"))


def _band(length: int, window: int | None, device: torch.device) -> Tensor | None:
    """Returns which tokens may be seen where a row is longer than a sliding window, bool (1, 1, T, T); else None, and
    torch sees to causality itself."""
    if window is None or length <= window:
        return None
    places_T = torch.arange(length, device=device)
    back_TT = places_T[:, None] - places_T[None, :]
    return ((back_TT >= 0) & (back_TT < window))[None, None]
