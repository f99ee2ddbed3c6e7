"""Reads what rows have in common once, and each row's own end from the key-value cache of that.

The options of a question come after the same prompt: a row for each would read it as often as there are options. The
prompts of some questions are read together into one cache; then a copy of its rows, one for each option, reads the
options. Routers that settle experts by prompt read it in the first forward, and each option goes on with the experts
that its prompt's part of the cache was computed with.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from loramix.evaluation.asking import Asking
from loramix.evaluation.prompt_groups import Group, Row
from loramix.models.head import logits_at
from loramix.tuner.config import LoramixConfig
from loramix.tuner.guide import ForwardGuide
from loramix.tuner.held import Held, held_together, rows_held

MOST_TOKENS = 4096
"""Tokens of a batch whose logits are wanted at most: a batch of long texts would take gigabytes for them."""

FORWARD = 32
"""What a forward costs beside its tokens, in tokens: the weights are read whatever they are multiplied with."""

Found = list[tuple[Row, Tensor]]
"""Rows of a batch, each with the logits that predict its continuation, (L, V)."""


@dataclass(frozen=True)
class Prompts:
    """What some groups share, read.

    Attributes:
        groups: whose it is.
        cache: keys and values, rows padded on the left.
        mask_QW: which tokens of it are real, int64 (Q, W).
        last_QV: the logits behind each.
        held: by group the experts that go on answering, or None where none are settled by prompt.
    """

    groups: Sequence[Group]
    cache: DynamicCache
    mask_QW: Tensor
    last_QV: Tensor
    held: list[Held] | None


def can_share(model: nn.Module) -> bool:
    """Whether a row read in parts gives what it gives when read at once.

    So it is where the base keeps all keys and values and is told each token's position, and where the active adapter
    routes no token by what else this forward holds of its row. Adapters of other PEFT methods are not looked into.
    """
    base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    told = inspect.signature(base.forward).parameters
    if not {"past_key_values", "position_ids", "attention_mask"} <= set(told) or base.config.is_encoder_decoder:
        return False
    if not _keeps_all(DynamicCache(config=base.config)):
        return False
    configs = getattr(model, "peft_config", {})
    if not all(isinstance(config, LoramixConfig) for config in configs.values()):
        return False
    routers = [config.router_config() for config in configs.values()]
    return all(router is None or router.in_parts for router in routers)


def shared_logits(
    model: nn.Module,
    groups: Sequence[Group],
    *,
    asking: Asking,
    pad_token_id: int,
    can_choose: bool,
    batch_size: int,
) -> Iterator[Found]:
    """Yields rows with the logits that predict their continuations, some at a time.

    Args:
        model: one that `can_share`, in evaluation mode.
        groups: from `grouped`, with the whole context shared where experts are settled by prompt.
        asking: what it is told of the expert.
        pad_token_id: fills rows.
        can_choose: from `head_can_choose`.
        batch_size: groups whose shared part is read together at most.
    """
    for together in _batches(groups, batch_size):
        prompts = _read(model, together, asking, pad_token_id, can_choose)
        behind = [(place, row) for place, group in enumerate(together) for row in group.rows]
        whole = [(place, row) for place, row in behind if len(row.fed) == len(together[place].shared)]
        if whole:
            yield [(row, prompts.last_QV[place][None]) for place, row in whole]
        ends = [(place, row) for place, row in behind if len(row.fed) > len(together[place].shared)]
        for some in _ends(ends, prompts, batch_size):
            yield _go_on(model, prompts, some, asking, pad_token_id, can_choose)


def _keeps_all(cache: DynamicCache) -> bool:
    """Whether a cache forgets nothing: no sliding window, no state that is overwritten."""
    return all(type(layer) is DynamicLayer for layer in cache.layers)


def _batches(groups: Sequence[Group], batch_size: int) -> Iterator[list[Group]]:
    """Yields groups of similar length together, the longest first: what does not fit into memory shows at once."""
    left = sorted(groups, key=lambda group: (-len(group.shared), group.shared))
    while left:
        most = max(1, min(batch_size, MOST_TOKENS // len(left[0].shared)))
        count = _alike([len(group.shared) for group in left[:most]])
        yield left[:count]
        left = left[count:]


def _ends(ends: list[tuple[int, Row]], prompts: Prompts, batch_size: int) -> Iterator[list[tuple[int, Row]]]:
    """Yields the rows that are read together behind their prompts.

    Ends are short, so more than `batch_size` of them go together, but no more tokens than the prompts had; and copies
    of the cache as long as MOST_TOKENS allow.
    """
    places, width = prompts.mask_QW.shape

    def length(end: tuple[int, Row]) -> int:
        return len(end[1].fed) - len(prompts.groups[end[0]].shared)

    left = sorted(ends, key=lambda end: (-length(end), end[0]))
    while left:
        longest = length(left[0])
        most = min(max(batch_size, places * width // longest), MOST_TOKENS // (width + longest))
        count = _alike([length(end) for end in left[: max(1, most)]])
        yield left[:count]
        left = left[count:]


def _alike(lengths: Sequence[int]) -> int:
    """Returns how many of some rows, the longest first, to read in one forward: to where another one costs less than
    padding all further rows to the first one's length."""
    for number, length in enumerate(lengths):
        if (lengths[0] - length) * (len(lengths) - number) > FORWARD:
            return number
    return len(lengths)


def _read(model: nn.Module, groups: Sequence[Group], asking: Asking, pad_token_id: int, can_choose: bool) -> Prompts:
    """Reads what the groups share; padded on the left, so that each one's last token is the last of its row."""
    base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    device = next(model.parameters()).device
    width = max(len(group.shared) for group in groups)
    padded = [[pad_token_id] * (width - len(group.shared)) + list(group.shared) for group in groups]
    lengths_Q = torch.tensor([len(group.shared) for group in groups], device=device)
    places_W = torch.arange(width, device=device)
    mask_QW = (places_W >= width - lengths_Q[:, None]).long()
    cache = DynamicCache(config=base.config)
    last_QPV = logits_at(
        model,
        places_W[-1:],
        can_choose=can_choose,
        input_ids=torch.tensor(padded, device=device),
        attention_mask=mask_QW,
        position_ids=(places_W - (width - lengths_Q[:, None])).clamp(min=0),
        past_key_values=cache,
        use_cache=True,
        **asking.of_forward(mask_QW.bool()),
    )
    guide = ForwardGuide.on(base)
    routings = None if guide is None or asking.expert is not None else guide.routings_of(cache)
    return Prompts(groups, cache, mask_QW, last_QPV[:, 0], None if routings is None else rows_held(routings))


def _go_on(
    model: nn.Module,
    prompts: Prompts,
    ends: Sequence[tuple[int, Row]],
    asking: Asking,
    pad_token_id: int,
    can_choose: bool,
) -> Found:
    """Reads the ends of some rows behind their prompts."""
    device = prompts.mask_QW.device
    base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    own = [row.fed[len(prompts.groups[place].shared) :] for place, row in ends]
    starts_B, lengths_B, places_B = torch.tensor(
        [[len(row.fed) - len(tokens), len(tokens), place] for (place, row), tokens in zip(ends, own, strict=True)],
        device=device,
    ).unbind(dim=1)
    longest = max(map(len, own))
    ids_BT = torch.tensor([[*tokens, *[pad_token_id] * (longest - len(tokens))] for tokens in own], device=device)
    places_T = torch.arange(longest, device=device)
    mask_BT = (places_T < lengths_B[:, None]).long()
    # The first token of a continuation is predicted by the last of its context, which may have been read already.
    first = max(
        0, min(row.context - 1 - (len(row.fed) - len(tokens)) for (_, row), tokens in zip(ends, own, strict=True))
    )
    asked: dict[str, Any] = {
        "input_ids": ids_BT,
        "attention_mask": torch.cat([prompts.mask_QW[places_B], mask_BT], dim=1),
        "position_ids": starts_B[:, None] + places_T,
        "past_key_values": _rows_of(prompts.cache, places_B),
        "use_cache": True,
        **asking.of_generation(len(ends), device),
    }
    guide = ForwardGuide.on(base)
    if guide is None or prompts.held is None:
        logits_BPV = logits_at(model, places_T[first:], can_choose=can_choose, **asked)
    else:
        active = guide.active()
        assert active is not None, "somebody held experts"
        held = held_together([prompts.held[place] for place, _ in ends], active.scopes, device)
        with guide.settled(held):
            logits_BPV = logits_at(model, places_T[first:], can_choose=can_choose, **asked)
    found: Found = []
    for (place, row), tokens, logits_PV in zip(ends, own, logits_BPV, strict=True):
        begins = row.context - 1 - (len(row.fed) - len(tokens))
        logits_LV = logits_PV[max(begins, 0) - first : len(tokens) - first]
        found.append((row, logits_LV if begins >= 0 else torch.cat([prompts.last_QV[place][None], logits_LV])))
    return found


def _rows_of(cache: DynamicCache, places_B: Tensor) -> DynamicCache:
    """Returns copies of some rows of a cache; the cache itself stays."""
    chosen = copy.copy(cache)
    chosen.layers = [copy.copy(layer) for layer in cache.layers]
    chosen.batch_select_indices(places_B)
    return chosen
