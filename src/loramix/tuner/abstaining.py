"""Which prompts are the base's: a calibrated adapter's score of each prompt, and what follows from it for the routing.

One layer's reading speaks for the whole prompt, whatever the decision: under "per_layer" too a prompt that is unlike
all domains gets no expert in any layer, because what is unfamiliar is the prompt, not a layer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace

import torch
from torch import Tensor

from loramix.errors import ConfigError
from loramix.routers.abstention import Abstention, AbstentionConfig
from loramix.routing import NO_EXPERT, Routing
from loramix.tuner.decisions import settle
from loramix.tuner.mixture import Mixture

BASE = "base"
"""What the base alone is called where an expert is named; no expert may have the name."""


@dataclass(frozen=True)
class Verdict:
    """Which prompts of a batch no expert fits.

    Attributes:
        scores_B: how far each is from all domains, (B,).
        threshold: the score above which a prompt is the base's.
    """

    scores_B: Tensor
    threshold: float

    def abstains(self) -> Tensor:
        """Returns for each prompt whether it is the base's, bool (B,)."""
        return self.scores_B > self.threshold


@dataclass(frozen=True)
class Calibrated:
    """The calibration of an adapter, ready to be asked.

    Attributes:
        layer: the scope whose router's reading it looks at.
        part: scores prompts.
        threshold: the score above which a prompt is the base's.
    """

    layer: str
    part: Abstention
    threshold: float

    def verdict(self, pooled: Mapping[str, Tensor]) -> Verdict:
        """Returns the verdict on prompts that were read at least up to the layer."""
        return Verdict(self.part.scores(pooled[self.layer]), self.threshold)


def calibration_of(mixture: Mixture, abstain: bool | None) -> Calibrated | None:
    """Returns what to ask, or None where nothing is: the caller does not want it, or nothing was calibrated.

    Args:
        mixture: the active adapter.
        abstain: the caller's wish; by default yes, if there is a calibration.

    Raises:
        ConfigError: it is wanted, and there is none.
    """
    config = mixture.config.abstention_config()
    if abstain is False or (config is None and abstain is None):
        return None
    if config is None:
        raise ConfigError(
            "abstain = True, but the adapter is not calibrated, so no prompt can be told from those it learned. "
            "Calibrate it (`loramix calibrate RUN`), or leave abstain out."
        )
    part = None if config.layer not in mixture.doors else mixture.doors[config.layer].router(mixture.name).abstention
    if part is None:
        raise ConfigError(
            f"abstention.layer = {config.layer!r}: no calibrated router there. Expected one of "
            f"{', '.join(mixture.scopes)}. Calibrate the adapter anew."
        )
    return Calibrated(config.layer, part, config.threshold)


def held_experts(
    routings: Mapping[str, Routing], decision: str, verdict: Verdict | None
) -> Tensor | dict[str, Routing]:
    """Returns the experts of all rows as they are held while the rows are continued: ids (B,), NO_EXPERT where no
    expert fits; or under "per_layer" a routing for each scope, of weight 0 there."""
    if decision == "per_layer":
        if verdict is None:
            return dict(routings)
        fits_B1 = ~verdict.abstains()[:, None]
        return {scope: replace(r, weights=r.weights * fits_B1.to(r.weights.dtype)) for scope, r in routings.items()}
    ids_B, _ = settle(routings, decision)
    return ids_B if verdict is None else torch.where(verdict.abstains(), NO_EXPERT, ids_B)


def put(mixture: Mixture, config: AbstentionConfig, part: Abstention) -> None:
    """Puts a calibration into an adapter, in place of any that is there."""
    for scope, door in mixture.doors.items():
        router = door.router(mixture.name)
        router.abstention = part.to(router.w_in_HI.device) if scope == config.layer else None
    mixture.config.abstention = asdict(config)
