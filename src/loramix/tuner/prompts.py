"""The prompts alone of a batch of rows: what the base reads when a router wants to know no more than them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from loramix.routing import Call
from loramix.segments import BORDERS, Segments

Reading = tuple[Tensor, dict[str, Any], Call]
"""Inputs, further arguments of the forward, and its call."""


def prompts_alone(inputs: Tensor, kwargs: Mapping[str, Any], call: Call, upto: str) -> Reading:
    """Returns the forward in which the base alone reads the prompts, no further than they go.

    Args:
        inputs: token ids (B, T) or embeddings (B, T, I).
        kwargs: of the whole forward.
        call: of the whole forward.
        upto: the scope after whose router nothing more is wanted.
    """
    if call.segments is not None:
        return _of_one_long_row(inputs, call, call.segments, upto)
    width = call.prompt_width or call.prompt_mask_BT.shape[1]
    masks = call.mask_BT[:, :width], call.prompt_mask_BT[:, :width]
    own = Call(*masks, base_only=True, stop_after=upto)
    cut = {k: v[..., :width] if k == "position_ids" and v is not None else v for k, v in kwargs.items()}
    return inputs[:, :width], {**cut, "attention_mask": masks[0].long()}, own


def _of_one_long_row(inputs: Tensor, call: Call, segments: Segments, upto: str) -> Reading:
    kept_M, borders_B1 = segments.prefixes(segments.last_true(call.prompt_mask_BT[0]))
    short = Segments.between(borders_B1, len(kept_M))
    longest = int((short.ends_B - short.starts_B).max())
    places_M = torch.arange(len(kept_M), device=kept_M.device)
    cut = {
        "position_ids": (places_M - short.spread(short.starts_B))[None],
        **dict(zip(BORDERS, (borders_B1, borders_B1, longest, longest), strict=True)),
    }
    masks = call.mask_BT[:, kept_M], call.prompt_mask_BT[:, kept_M]
    return inputs[:, kept_M], cut, Call(*masks, base_only=True, stop_after=upto, segments=short)
