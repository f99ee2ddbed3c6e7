"""One adapter as the guide sees it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from loramix.errors import ConfigError
from loramix.methods import method_named
from loramix.routers import SettledBy
from loramix.tuner.config import LoramixConfig
from loramix.tuner.layer import LoramixLinear


@dataclass(frozen=True)
class Mixture:
    """One adapter as the guide sees it.

    Attributes:
        name: the adapter's name.
        config: its settings.
        layer: one of its adapted modules, which knows whether the adapter is active.
        doors: scope -> the module its router sits at, in forward order; empty for a method that routes nothing.
    """

    name: str
    config: LoramixConfig
    layer: LoramixLinear
    doors: dict[str, LoramixLinear]

    @property
    def scopes(self) -> tuple[str, ...]:
        return tuple(self.doors)

    @property
    def settled_by(self) -> SettledBy:
        return method_named(self.config.method).settled_by

    @property
    def reads_base(self) -> bool:
        return bool((self.config.router or {}).get("reads") == "base")

    @property
    def labels(self) -> list[str]:
        """What the positions in `domain_ids` stand for: the domains a task gate knows, else the experts."""
        return list(self.config.domains or self.config.experts or [])

    @property
    def active(self) -> bool:
        return not self.layer.disable_adapters and self.name in self.layer.active_adapters


def checked_ids(domain_ids: Tensor, rows: int, mixture: Mixture, device: torch.device) -> Tensor:
    """Returns the labels on the model's device.

    Raises:
        ConfigError: not one position among the experts for each row.
    """
    labels = mixture.labels
    if domain_ids.shape != (rows,) or domain_ids.is_floating_point():
        raise ConfigError(
            f"domain_ids has shape {tuple(domain_ids.shape)} and type {domain_ids.dtype}. Expected int64 ({rows},): "
            f"one position among the {len(labels)} names ({', '.join(labels)}) for each row."
        )
    # On an accelerator looking at the values would make every step wait for them; there the gather itself complains.
    if domain_ids.device.type == "cpu" and not bool(((domain_ids >= 0) & (domain_ids < len(labels))).all()):
        raise ConfigError(
            f"domain_ids = {domain_ids.tolist()}: expected positions from 0 to {len(labels) - 1} ({', '.join(labels)})."
        )
    return domain_ids.to(device)
