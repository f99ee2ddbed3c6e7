"""What sequence routers read of prompts, collected once: with frozen experts it does not change while routers learn."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor

from loramix.models.head import head_can_choose
from loramix.tuner.guide import ForwardGuide

Prompt = tuple[Sequence[int], int]
"""Token ids of a prompt, and the position of its domain among the experts."""


@torch.no_grad()
def prompt_states(
    model: Any, prompts: Sequence[Prompt], *, pad_token_id: int, batch_size: int = 8
) -> dict[str, Tensor]:
    """Returns what the router of each scope takes in of each prompt, fp32 (N, I), in forward order.

    A router that reads the base is shown the base alone; one that reads the running model is shown it with the label's
    expert in all layers, as in training.

    Args:
        model: a PeftModel with a sequence-routed adapter.
        prompts: ids and domain.
        pad_token_id: of the base.
        batch_size: prompts read together.
    """
    mixture = ForwardGuide.of(model.get_base_model()).active()
    assert mixture is not None
    found: dict[str, list[Tensor]] = {scope: [] for scope in mixture.doors}
    mask_BT = torch.zeros(0)

    def take(scope: str, router: Any, module: Any, inputs: tuple[Tensor, ...]) -> None:
        x = inputs[0]
        x_BTI = x if x.dim() == 3 else x.view(*mask_BT.shape, -1)
        found[scope].append(router.pool(x_BTI, mask_BT).float().cpu())

    hooks = [
        door.register_forward_pre_hook(partial(take, scope, door.router(mixture.name)))
        for scope, door in mixture.doors.items()
    ]
    alone: Callable[[], Any] = model.disable_adapter if mixture.reads_base else nullcontext
    few = {"logits_to_keep": 1} if head_can_choose(model) else {}
    model.eval()
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i][0]))  # like lengths together: little is padded
    try:
        for start in range(0, len(prompts), batch_size):
            some = [prompts[i] for i in order[start : start + batch_size]]
            width = max(len(ids) for ids, _ in some)
            ids_BT = torch.full((len(some), width), pad_token_id)
            real_BT = torch.zeros(len(some), width, dtype=torch.bool)
            for row, (ids, _) in enumerate(some):
                ids_BT[row, : len(ids)] = torch.tensor(list(ids))
                real_BT[row, : len(ids)] = True
            mask_BT = real_BT.to(model.device)
            told = {} if mixture.reads_base else {"domain_ids": torch.tensor([domain for _, domain in some])}
            with alone():
                model(input_ids=ids_BT.to(model.device), attention_mask=mask_BT.long(), use_cache=False, **told, **few)
    finally:
        for hook in hooks:
            hook.remove()
    back = torch.tensor(order).argsort()
    return {scope: torch.cat(parts)[back] for scope, parts in found.items()}
