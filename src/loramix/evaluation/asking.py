"""What a model is told of the expert that is to answer, where nobody but the caller can know it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from loramix.errors import ConfigError, did_you_mean
from loramix.methods import method_named
from loramix.routers import SettledBy
from loramix.tuner.config import LoramixConfig


@dataclass(frozen=True)
class Asking:
    """What a model is told of the expert with every forward.

    Attributes:
        settled_by: what its routing follows from; "nothing" for a base or a single LoRA.
        expert: the position of the pinned expert, or of the domain; None for the model's own routing.
    """

    settled_by: SettledBy
    expert: int | None = None

    def of_forward(self, prompt_mask_BW: Tensor) -> dict[str, Any]:
        """Returns the routing arguments of a forward over contexts with their continuations.

        Args:
            prompt_mask_BW: the tokens of the contexts, bool (B, W); what a router may read.
        """
        told = self.of_generation(len(prompt_mask_BW), prompt_mask_BW.device)
        return {**told, "prompt_mask": prompt_mask_BW} if self.settled_by == "prompt" else told

    def of_generation(self, rows: int, device: torch.device) -> dict[str, Any]:
        """Returns the routing arguments of a generation from prompts."""
        return {} if self.expert is None else {"domain_ids": torch.full((rows,), self.expert, device=device)}


def asking_of(model: nn.Module, expert: str | None) -> Asking:
    """Returns what to tell a model of the expert.

    Args:
        model: a base or a PeftModel.
        expert: the name of the expert to pin, or of the domain for a model that must be told it; None leaves the choice
            to the model.

    Raises:
        ConfigError: the model pins no expert, has none of that name, or must be told one.
    """
    configs = getattr(model, "peft_config", {})
    config = configs.get(getattr(model, "active_adapter", None), None)
    if not isinstance(config, LoramixConfig) or method_named(config.method).settled_by == "nothing":
        if expert is not None:
            raise ConfigError(
                f"expert = {expert!r}: this model settles no expert for a prompt (a base, a single LoRA, or a mixture "
                "routed token by token), so none can be pinned. Leave it out."
            )
        return Asking("nothing")
    settled_by = method_named(config.method).settled_by
    names = list((config.domains if settled_by == "domain" else None) or config.experts or [])
    if expert is None:
        if settled_by == "domain":
            raise ConfigError(
                f"method {config.method} must be told the domain of every question, and a benchmark does not say it. "
                f"Pin one of {', '.join(names)} (--expert NAME)."
            )
        if config.decision == "pinned":
            raise ConfigError(
                'this adapter\'s decision is "pinned": somebody else says which expert answers. '
                f"Pin one of {', '.join(names)} (--expert NAME)."
            )
        return Asking(settled_by)
    if expert not in names:
        raise ConfigError(
            f"expert = {expert!r}: no such expert.{did_you_mean(expert, names)} Expected one of {', '.join(names)}."
        )
    return Asking(settled_by, names.index(expert))
