"""Experts that are held for single rows, so that rows settled apart can be continued together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor

from loramix.routing import Routing

Held = int | dict[str, int]
"""What one row keeps while it is continued: its expert's position (NO_EXPERT for the base), or one for each scope."""


def rows_held(held: Tensor | dict[str, Routing]) -> list[Held]:
    """Returns what each row of one settling holds.

    Args:
        held: what `settle_prompts` returned.
    """
    if isinstance(held, Tensor):
        return [int(expert) for expert in held.tolist()]
    by_scope = {scope: _experts(routing) for scope, routing in held.items()}
    rows = len(next(iter(by_scope.values())))
    return [{scope: experts[row] for scope, experts in by_scope.items()} for row in range(rows)]


def held_together(rows: Sequence[Held], scopes: Sequence[str], device: torch.device) -> Tensor | dict[str, Routing]:
    """Returns what holds the experts of rows in one forward; the other way round of `rows_held`.

    Args:
        rows: of each row.
        scopes: all scopes with a router.
        device: the model's.
    """
    if all(isinstance(row, int) for row in rows):
        return torch.tensor(cast(list[int], rows), device=device)
    of_scope = {scope: [row if isinstance(row, int) else row[scope] for row in rows] for scope in scopes}
    return {scope: _hard(torch.tensor(experts, device=device)) for scope, experts in of_scope.items()}


def _experts(routing: Routing) -> list[int]:
    assert routing.ids is not None
    return torch.where(routing.weights[:, 0] > 0, routing.ids[:, 0], -1).tolist()


def _hard(experts_B: Tensor) -> Routing:
    return Routing(
        ids=experts_B.clamp(min=0)[:, None],
        weights=(experts_B >= 0).float()[:, None],
        logits=None,
        level="sequence",
        mask=torch.ones_like(experts_B, dtype=torch.bool),
    )
