"""A method is a frozen value: a paper as a list of choices over shared parts. It has no forward."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from loramix.experts.config import BankConfig
from loramix.routers.base import RouterConfig, SettledBy

Scope = Literal["module", "block", "layer", "model"]
StageData = Literal["each domain alone", "all domains", "a few examples", "none"]
ExpertCount = Literal["none", "one", "one per domain", "chosen"]


@dataclass(frozen=True, kw_only=True)
class FewShotSearch:
    """A search without gradients (LoRAHub, section 3.3)."""

    budget: int = 40
    """How many weightings are tried."""
    examples_per_domain: int = 5
    l1: float = 0.05
    """Factor of the mean absolute weight in the objective."""
    bound: float = 1.5
    """Weights are kept within [-bound, bound]."""


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A part of training: what trains, on which data, with which losses beside the language-model loss."""

    name: str
    trains: tuple[str, ...]
    """Of "base", "experts", "routers"; nothing where parts are only put together."""
    data: StageData
    losses: Mapping[str, float] = field(default_factory=dict)
    """Auxiliary losses by name with their weights; `training.losses` overrides the weights."""
    search: FewShotSearch | None = None
    """Instead of gradients, for a stage on a few examples."""

    @property
    def takes_steps(self) -> bool:
        """Whether the stage trains something by gradient steps."""
        return bool(self.trains) and self.search is None


@dataclass(frozen=True, kw_only=True)
class Method:
    """The choices that make a method."""

    name: str
    title: str
    paper: str
    """Where it was published: a link."""
    summary: str
    """One sentence for tables."""
    equation: str
    """What an adapted module, or the training, computes; one line of plain text."""
    stages: tuple[Stage, ...]
    expert_count: ExpertCount
    tuner: Literal["loramix", "prefix", "none"] = "loramix"
    """Who adapts the base: loramix, PEFT's own prefix tuning, or nobody (the base itself is trained)."""
    bank: BankConfig = field(default_factory=BankConfig)
    """What the experts of a module share and how they are added up."""
    router: RouterConfig | None = None
    """None: nothing to route, every token goes through the one expert."""
    scope: Scope | None = None
    """Who shares one router's decision."""
    routed: Literal["all targets", "ffn"] = "all targets"
    """Which targets carry the experts. With "ffn" the others carry one plain LoRA each."""
    whole_ffn: bool = False
    """Whether an expert is a whole feed-forward block, weighed after it, rather than a delta on each linear."""
    decision: str | None = None
    """How a sequence is settled at inference, by default; None where no sequence is settled."""
    defaults: Mapping[str, Any] = field(default_factory=dict)
    """The paper's adapter settings, where they differ from loramix's; what the user sets wins."""

    @property
    def losses(self) -> dict[str, float]:
        """All auxiliary losses of all stages with their weights, in order of first use."""
        return {name: weight for stage in self.stages for name, weight in stage.losses.items()}

    @property
    def settled_by(self) -> SettledBy:
        """What a routing follows from beside the tokens at hand; "nothing" where nothing is routed."""
        return self.router.settled_by if self.router is not None else "nothing"

    @property
    def possible_losses(self) -> set[str]:
        """Auxiliary losses that may be given a weight: the method's own, and balance losses where tokens are routed."""
        by_token = self.router is not None and self.router.level == "token" and "routers" in self.trains
        extra = {"load_balance", "router_z", "localized_balance", "localized_balance_cv"} if by_token else set()
        return set(self.losses) | extra

    @property
    def trains(self) -> tuple[str, ...]:
        """What of the finished model its last stage trains; the rest of the adapter is frozen."""
        return self.stages[-1].trains

    @property
    def starts_from_experts(self) -> bool:
        """Whether experts are trained, each on its domain, before the method puts them together."""
        return self.stages[0].data == "each domain alone"

    def as_dict(self) -> dict[str, Any]:
        """Returns all choices as plain values, for JSON."""
        content = asdict(self)
        content["losses"] = dict(self.losses)
        for stage in content["stages"]:
            stage["trains"] = list(stage["trains"])
        content["stages"] = list(content["stages"])
        return content
