"""Teaches sequence routers alone, from prompt states collected once: seconds, where training the whole takes hours.

The loss is the routing cross-entropy of MoA's second stage (Feng et al. 2024, section 3.2), each router its own; with
the experts frozen there is nothing else to learn, so the language-model loss and the response are not needed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from loramix.routers.sequence import ACTIVATIONS, ADDED_UNITS, SequenceRouter


@dataclass(frozen=True)
class RouterFit:
    """How routers are taught. All prompts are one batch; AdamW with a cosine to zero.

    Attributes:
        steps: updates.
        learning_rate: at the start.
        weight_decay: keeps the scores of separable domains from growing without end.
        seed: of what begins at random.
    """

    steps: int = 300
    learning_rate: float = 3e-3
    weight_decay: float = 0.01
    seed: int = 0


def fit_routers(
    routers: Mapping[str, SequenceRouter], states: Mapping[str, Tensor], labels_N: Tensor, settings: RouterFit
) -> dict[str, float]:
    """Teaches every router the labels, in place, and returns the last loss of each.

    Args:
        routers: by scope.
        states: what each takes in, (N, I), by scope.
        labels_N: the right expert of each prompt, int64 (N,).
        settings: how.
    """
    losses = {}
    for scope, router in routers.items():
        parameters = [router.w_in_HI.requires_grad_(True), router.w_out_EH.requires_grad_(True)]
        states_NI, right_N = states[scope].to(router.w_in_HI.device), labels_N.to(router.w_in_HI.device)
        weights_N = _balanced(right_N, router.num_experts)

        def loss(router: Any = router, x: Tensor = states_NI, y: Tensor = right_N, w: Tensor = weights_N) -> Tensor:
            return (F.cross_entropy(router.logits(x), y, reduction="none") * w).sum()

        losses[scope] = _minimise(loss, parameters, settings)
    return losses


def fit_added(
    router: SequenceRouter, states_NI: Tensor, labels_N: Tensor, settings: RouterFit
) -> tuple[Tensor, Tensor]:
    """Returns what a new expert adds to a router: w_in rows (ADDED_UNITS, I), and its row of w_out (H + ADDED_UNITS,).

    The old scores are held; only the new one is learned, against them. Its units come from a draw of their own.

    Args:
        router: as it is, of E experts.
        states_NI: prompt states, of old domains (replay) and of the new one.
        labels_N: the right expert; the new one is E.
        settings: how.
    """
    draw = torch.Generator().manual_seed(settings.seed)
    activation = ACTIVATIONS[router.config.activation]
    x_NI, y_N = states_NI.float().cpu(), labels_N.cpu()
    with torch.no_grad():
        old_NE = router.logits(states_NI.to(router.w_in_HI.device)).cpu()
        seen_NH = activation(F.linear(x_NI, router.w_in_HI.detach().float().cpu()))
    bound = x_NI.shape[1] ** -0.5
    w_in_UI = ((torch.rand(ADDED_UNITS, x_NI.shape[1], generator=draw) * 2 - 1) * bound).requires_grad_(True)
    w_row_H = torch.zeros(seen_NH.shape[1] + ADDED_UNITS, requires_grad=True)
    w_row_H.data[-ADDED_UNITS:] = (torch.rand(ADDED_UNITS, generator=draw) * 2 - 1) * ADDED_UNITS**-0.5
    weights_N = _balanced(y_N, router.num_experts + 1)

    def loss() -> Tensor:
        new_N = torch.cat([seen_NH, activation(F.linear(x_NI, w_in_UI))], dim=1) @ w_row_H
        return (F.cross_entropy(torch.cat([old_NE, new_N[:, None]], dim=1), y_N, reduction="none") * weights_N).sum()

    _minimise(loss, [w_in_UI, w_row_H], settings)
    return w_in_UI.detach(), w_row_H.detach()


def _balanced(labels_N: Tensor, experts: int) -> Tensor:
    """Returns weights that sum to 1 and to the same for each expert that occurs, however many prompts each has."""
    counts_E = torch.bincount(labels_N, minlength=experts).clamp(min=1)
    weights_N = 1.0 / counts_E[labels_N].float()
    return weights_N / weights_N.sum()


def _minimise(loss: Any, parameters: list[Tensor], settings: RouterFit) -> float:
    optimizer = torch.optim.AdamW(parameters, lr=settings.learning_rate, weight_decay=settings.weight_decay)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, settings.steps)
    value = 0.0
    for _ in range(settings.steps):
        optimizer.zero_grad()
        now = loss()
        now.backward()
        optimizer.step()
        schedule.step()
        value = float(now.detach())
    return value
