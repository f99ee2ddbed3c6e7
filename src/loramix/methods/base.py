"""A method is a frozen value: a paper as a list of choices over shared parts. It has no forward."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from loramix.routers.base import RouterConfig

Scope = Literal["layer"]
StageData = Literal["each domain alone", "all domains"]


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A part of training: what trains, on which data, with which losses beside the language-model loss."""

    name: str
    trains: tuple[str, ...]
    """Of "experts", "routers"."""
    data: StageData
    losses: tuple[str, ...] = ()
    """Names of auxiliary losses; each is weighted by the setting of the same name in the training config."""


@dataclass(frozen=True, kw_only=True)
class Method:
    """The choices that make a method."""

    name: str
    title: str
    paper: str
    """Where it was published: a link."""
    summary: str
    """One sentence for tables."""
    expert_count: Literal["one", "one per domain"]
    router: RouterConfig | None
    """None: nothing to route, every token goes through the one expert."""
    scope: Scope | None
    """Who shares one router's decision."""
    decision: str | None
    """How a sequence is settled at inference, by default; None where no sequence is settled."""
    stages: tuple[Stage, ...]

    @property
    def losses(self) -> tuple[str, ...]:
        """All auxiliary losses of all stages, in order of first use."""
        return tuple(dict.fromkeys(loss for stage in self.stages for loss in stage.losses))
