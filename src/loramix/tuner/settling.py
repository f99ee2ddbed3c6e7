"""Settles the experts of some prompts: the routers are asked once, or the caller has named them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from loramix.errors import ConfigError, did_you_mean
from loramix.routing import Call, Routing
from loramix.tuner.abstaining import calibration_of, held_experts
from loramix.tuner.decisions import decision_problem
from loramix.tuner.guide import ForwardGuide
from loramix.tuner.routes import Route, pinned_route, positions, routes_from


@dataclass(frozen=True)
class Wish:
    """What a caller wants of the routing.

    Attributes:
        decision: how it is settled; the adapter's own by default.
        expert: pins one expert, or one for each prompt; "base" for none.
        abstain: let the base answer prompts that no expert fits; by default if the adapter is calibrated for it.
        allowed: the experts to choose among; None for all.
    """

    decision: str | None = None
    expert: str | Sequence[str] | None = None
    abstain: bool | None = None
    allowed: Sequence[str] | None = None


def settle_prompts(
    guide: ForwardGuide, inputs: Tensor, kwargs: Mapping[str, Any], wish: Wish
) -> tuple[list[Route], Tensor | dict[str, Routing]]:
    """Returns the routes of prompts and what holds them: ids (B,), or for "per_layer" a routing per layer.

    Args:
        guide: of a model whose active adapter settles experts by the prompt.
        inputs: token ids (B, T) or embeddings (B, T, I).
        kwargs: of the forward that would read them; `attention_mask` and positions are taken from it.
        wish: what the caller wants.

    Raises:
        ConfigError: an unknown expert or decision, wishes that contradict each other, no calibration.
    """
    mixture = guide.active()
    assert mixture is not None
    experts = list(mixture.config.experts or [])
    rows, length = inputs.shape[:2]
    if wish.expert is not None:
        _check_pin(wish)
        names = [wish.expert] * rows if isinstance(wish.expert, str) else list(wish.expert)
        ids = positions(names, experts, rows)
        return [pinned_route(name, experts) for name in names], torch.tensor(ids, device=inputs.device)
    decision = wish.decision or mixture.config.decision or "last"
    if problem := decision_problem(decision):
        raise ConfigError(problem)
    mask_BT = kwargs.get("attention_mask")
    mask_BT = torch.ones(rows, length, device=inputs.device) if mask_BT is None else mask_BT
    call = Call(mask_BT=mask_BT.bool(), prompt_mask_BT=mask_BT.bool())
    call.allowed_BE = _allowed(wish.allowed, experts, rows, inputs.device)
    calibrated = calibration_of(mixture, wish.abstain)
    routings = guide.read_prompts(inputs, {**kwargs, "attention_mask": mask_BT}, call, decision, calibrated)
    verdict = None if calibrated is None else calibrated.verdict(call.pooled)
    return routes_from(routings, decision, experts, verdict), held_experts(routings, decision, verdict)


def _check_pin(wish: Wish) -> None:
    against = {
        "decision": wish.decision if wish.decision not in (None, "pinned") else None,
        "abstain": wish.abstain or None,
        "allowed": wish.allowed,
    }
    for name, value in against.items():
        if value is not None:
            raise ConfigError(f"{name} = {value!r} and expert = {wish.expert!r} contradict each other. Pass one.")


def _allowed(names: Sequence[str] | None, experts: Sequence[str], rows: int, device: torch.device) -> Tensor | None:
    """Returns which experts may be chosen, bool (B, E).

    Raises:
        ConfigError: an unknown expert, or none at all.
    """
    if names is None:
        return None
    unknown = [name for name in names if name not in experts]
    if unknown or not names:
        said = f"{unknown[0]!r}: no such expert.{did_you_mean(unknown[0], experts)}" if unknown else "it names none."
        raise ConfigError(f"allowed: {said} Expected some of {', '.join(experts)}.")
    mask_E = torch.tensor([name in names for name in experts], device=device)
    return mask_E.expand(rows, -1)
