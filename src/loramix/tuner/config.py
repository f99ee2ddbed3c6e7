"""LoramixConfig: the adapter's settings, in PEFT's words."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

from peft import PeftConfig

from loramix.errors import ConfigError, LoramixError, Problems, did_you_mean
from loramix.experts.apply import BACKENDS
from loramix.methods import Method, method_named
from loramix.routers import RouterConfig
from loramix.tuner.decisions import decision_problem
from loramix.tuner.registration import LORAMIX

SCHEMA_VERSION = 1
"""Raised when a file of this version could be misread by an older loramix."""


@dataclass
class LoramixConfig(PeftConfig):
    """Settings of one mixture. Names are PEFT's where PEFT has the thing.

    Args:
        task_type: as in PEFT; None for a model that is no transformers causal language model.
        method: a name in `loramix methods`.
        experts: names of the experts, in the order of `domain_ids`. Given by name or by `num_experts`.
        num_experts: E; names become expert_0, expert_1, ... when `experts` is not given.
        r: rank of every expert.
        lora_alpha: the delta is scaled by lora_alpha / r (by lora_alpha / sqrt(r) with `use_rslora`).
        lora_dropout: dropout on the adapter's input in training.
        use_rslora: see `lora_alpha`.
        init_lora_weights: True starts with delta = 0 (B is zero); False leaves B random, for tests.
        target_modules: names (last part or whole), one regular expression, or "all-linear".
        exclude_modules: as target_modules, left out.
        layers_to_transform: numbers of the layers to adapt; all by default.
        layers_pattern: name of the list of layers, where it is not found by itself.
        modules_to_save: modules to train and save whole, as in PEFT.
        bias: "none"; biases stay frozen.
        router: settings of the method's router, for example {"pooling": "mean"}; the rest keeps the method's defaults.
        decision: how a sequence is settled at inference: "last", "vote", "per_layer", "layer:k" or "pinned".
        backend: "auto", or one of `experts.apply.BACKENDS`.
        schema_version: version of the file format; set by loramix.

    Raises:
        ConfigError: with all problems found.
    """

    task_type: str | None = "CAUSAL_LM"
    method: str = "moa"
    experts: list[str] | None = None
    num_experts: int | None = None
    r: int = 8
    lora_alpha: int = 16
    lora_dropout: float = 0.0
    use_rslora: bool = False
    init_lora_weights: bool = True
    target_modules: list[str] | str | None = "all-linear"
    exclude_modules: list[str] | str | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    modules_to_save: list[str] | None = None
    bias: str = "none"
    router: dict[str, Any] | None = None
    decision: str | None = None
    backend: str = "auto"
    schema_version: int = field(default=SCHEMA_VERSION)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = LORAMIX
        if isinstance(self.target_modules, list):
            self.target_modules = set(self.target_modules)  # type: ignore[assignment]  # PEFT keeps it as a set
        if isinstance(self.exclude_modules, list):
            self.exclude_modules = set(self.exclude_modules)  # type: ignore[assignment]
        problems = Problems("the adapter's settings")
        self._check_numbers(problems)
        try:
            method = method_named(self.method)
        except LoramixError as error:
            problems.add(str(error))
        else:
            self._name_experts(method, problems)
            self._resolve_router(method, problems)
        problems.raise_as(ConfigError)

    def _check_numbers(self, problems: Problems) -> None:
        if self.r < 1:
            problems.add(f"r = {self.r}: a rank is at least 1. Common values are 4 to 64.")
        if self.lora_alpha <= 0:
            problems.add(f"lora_alpha = {self.lora_alpha}: expected more than 0. Common is 2 * r.")
        if not 0 <= self.lora_dropout < 1:
            problems.add(f"lora_dropout = {self.lora_dropout}: expected a probability from 0 to below 1.")
        if self.bias != "none":
            problems.add(f"bias = {self.bias!r}: loramix leaves biases frozen. Set bias to 'none'.")
        if self.backend != "auto" and self.backend not in BACKENDS:
            known = ["auto", *BACKENDS]
            problems.add(
                f"backend = {self.backend!r}: expected one of {', '.join(known)}.{did_you_mean(self.backend, known)}"
            )
        if self.schema_version > SCHEMA_VERSION:
            problems.add(
                f"schema_version = {self.schema_version}: written by a newer loramix; this one reads up to "
                f"{SCHEMA_VERSION}. Upgrade loramix."
            )

    def _name_experts(self, method: Method, problems: Problems) -> None:
        if self.experts is None:
            count = self.num_experts if self.num_experts is not None else (1 if method.expert_count == "one" else 0)
            self.experts = ["default"] if count == 1 else [f"expert_{e}" for e in range(count)]
        if self.num_experts is not None and self.num_experts != len(self.experts):
            problems.add(
                f"num_experts = {self.num_experts}, but {len(self.experts)} names are given in experts. Leave "
                "num_experts out."
            )
        self.num_experts = len(self.experts)
        repeated = sorted({name for name in self.experts if self.experts.count(name) > 1})
        if repeated:
            problems.add(f"experts: {', '.join(repeated)} given more than once. Expected distinct names.")
        if method.expert_count == "one" and len(self.experts) != 1:
            problems.add(f"method {method.name} has one expert, but {len(self.experts)} are named. Name one.")
        if method.expert_count == "one per domain" and len(self.experts) < 2:
            problems.add(
                f"method {method.name} mixes one expert per domain, but {len(self.experts)} are named. Set experts to "
                "the names of at least two domains."
            )

    def _resolve_router(self, method: Method, problems: Problems) -> None:
        if method.router is None:
            if self.router:
                problems.add(f"router: method {method.name} has none. Leave the setting out.")
            if self.decision is not None:
                problems.add(f"decision = {self.decision!r}: method {method.name} routes nothing. Leave it out.")
            return
        known = [one.name for one in fields(method.router)]
        given = self.router or {}
        for key in given:
            if key not in known:
                problems.add(f"router.{key}: no such setting. Expected {', '.join(known)}.{did_you_mean(key, known)}")
        if given.get("kind", method.router.kind) != method.router.kind:
            problems.add(f"router.kind = {given['kind']!r}: method {method.name} has a {method.router.kind} router.")
        resolved = replace(method.router, **{k: v for k, v in given.items() if k in known})
        for problem in resolved.problems():
            problems.add(problem)
        self.router = asdict(resolved)
        if self.decision is None:
            self.decision = str(method.decision)
        if wrong := decision_problem(str(self.decision)):
            problems.add(wrong)

    def router_config(self) -> RouterConfig | None:
        """Returns the router's settings as the frozen value that builds it, or None for a method without router."""
        default = method_named(self.method).router
        if default is None:
            return None
        return replace(default, **(self.router or {}))

    @property
    def scaling(self) -> float:
        """Factor of the delta."""
        return self.lora_alpha / (self.r**0.5 if self.use_rslora else self.r)

    def to_dict(self) -> dict[str, Any]:
        """Returns the settings with sets as sorted lists, so that the same adapter gives the same file."""
        return {k: sorted(v) if isinstance(v, set) else v for k, v in super().to_dict().items()}
