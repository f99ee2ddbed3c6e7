"""What the arguments of a forward say of its tokens: which are real, which are prompt, how many are cached."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from loramix.errors import ConfigError
from loramix.labels import IGNORED
from loramix.segments import Segments


def segments_of(inputs: Tensor, kwargs: Mapping[str, Any]) -> Segments | None:
    """Returns where rows begin and end in one long row of them, or None for an ordinary batch.

    Told by `cu_seq_lens_q`, or by positions that begin anew where there is one row and no mask: what transformers'
    attention goes by as well.

    Args:
        inputs: of the forward, (B, T, ...).
        kwargs: of the forward.
    """
    rows, tokens = inputs.shape[:2]
    borders, positions = kwargs.get("cu_seq_lens_q"), kwargs.get("position_ids")
    if rows != 1 or cached_tokens(kwargs.get("past_key_values")) > 0:
        return None
    if isinstance(borders, Tensor):
        return Segments.between(borders.to(inputs.device), tokens)
    if kwargs.get("attention_mask") is not None or not isinstance(positions, Tensor) or positions.dim() != 2:
        return None
    starts = (positions[0].diff() != 1).nonzero().flatten() + 1
    if len(starts) == 0:
        return None
    ends = starts.new_tensor([tokens])
    return Segments.between(torch.cat([starts.new_zeros(1), starts, ends]), tokens)


def real_tokens(attention_mask: Any, inputs: Tensor) -> Tensor:
    """Returns the mask of this forward's own tokens, bool (B, T); a mask over a cache is cut to its end."""
    rows, length = inputs.shape[:2]
    if isinstance(attention_mask, Tensor) and attention_mask.dim() == 2:
        return attention_mask[:, -length:].bool()
    return torch.ones(rows, length, dtype=torch.bool, device=inputs.device)


def generation_mask(model: Any, inputs: Tensor, kwargs: Mapping[str, Any]) -> Tensor | None:
    """Returns the mask `generate` will use: the one given, else real tokens are those that are not padding."""
    mask: Tensor | None = kwargs.get("attention_mask")
    pad = getattr(model.generation_config, "pad_token_id", None)
    end = getattr(model.generation_config, "eos_token_id", None)
    ends = end if isinstance(end, list) else [end]
    if mask is None and not inputs.is_floating_point() and pad is not None and pad not in ends:
        mask = (inputs != pad).long()
    return mask


def prompt_tokens(
    prompt_mask: Tensor | None, labels: Tensor | None, mask_BT: Tensor, segments: Segments | None = None
) -> Tensor:
    """Returns the tokens a router may read, bool (B, T): those the caller names (a narrower mask is false beyond its
    width); else those before the first supervised label; else all.

    Raises:
        ConfigError: labels leave a row without prompt.
    """
    if prompt_mask is not None:
        beyond = mask_BT.shape[1] - prompt_mask.shape[1]
        return torch.nn.functional.pad(prompt_mask.bool(), (0, beyond)) & mask_BT
    if labels is None:
        return mask_BT
    if segments is not None:
        before_response_BT = (segments.running((labels[0] != IGNORED).long()) == 0)[None]
        with_prompt_B = segments.any(before_response_BT[0])
    else:
        before_response_BT = mask_BT & ((labels != IGNORED).cumsum(dim=1) == 0)
        with_prompt_B = before_response_BT.any(dim=1)
    if not bool(with_prompt_B.all()):
        raise ConfigError(
            "a row's labels are supervised from its first token on, so its router would read the response it is to "
            "predict. Set labels to -100 on the prompt, or pass prompt_mask, bool (B, T), true on the prompt."
        )
    return before_response_BT


def cached_tokens(cache: Any) -> int:
    """Returns how many tokens a key-value cache holds; 0 for none."""
    return int(cache.get_seq_length()) if cache is not None and hasattr(cache, "get_seq_length") else 0


def prompt_width(prompt_mask: Tensor | None, prompt_mask_BT: Tensor) -> int:
    """Returns where the last prompt ends, without waiting for an accelerator: there the width of the mask the caller
    gave is taken for it."""
    if prompt_mask is not None and prompt_mask.shape[1] < prompt_mask_BT.shape[1]:
        return max(1, prompt_mask.shape[1])
    if prompt_mask_BT.device.type != "cpu":
        return prompt_mask_BT.shape[1]
    ends_T = prompt_mask_BT.any(dim=0).nonzero()
    return int(ends_T.max()) + 1 if len(ends_T) else 1
