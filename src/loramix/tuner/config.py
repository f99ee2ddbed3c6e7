"""LoramixConfig: the adapter's settings, in PEFT's words."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from typing import Any

from peft import PeftConfig

from loramix.errors import ConfigError, LoramixError, Problems, did_you_mean
from loramix.experts import BankConfig, allocation_problem, extremes
from loramix.experts.apply import BACKENDS
from loramix.methods import Method, method_named
from loramix.routers import RouterConfig
from loramix.routers.abstention import AbstentionConfig
from loramix.tuner.config_checks import abstention_problems, accepted_settings, backend_problems, name_problems
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
        num_experts: E; names become expert_0, expert_1, ... when `experts` is not given. Where an allocation gives
            layers fewer, they have the first ones.
        allocation: experts by layer: "uniform", digits for parts of the depth ("2468"), or a list.
        domains: names of the domains, for methods that are told the domain (moelora-task), in the order of
            `domain_ids`.
        r: rank of every expert (with the bank's `split_rank`, of all together); the method's own by default, else 8.
        lora_alpha: the delta is scaled by lora_alpha / r (by lora_alpha / sqrt(r) with `use_rslora`); the method's own
            by default, else 16.
        lora_dropout: dropout on the adapter's input in training; the method's own by default, else 0.
        use_rslora: see `lora_alpha`.
        init_lora_weights: True starts with delta = 0 (B is zero); False leaves B random, for tests.
        target_modules: names (last part or whole), one regular expression, or one of "all-linear", "attention-linear",
            "ffn-linear", "qv-linear"; the method's own by default, else "all-linear".
        exclude_modules: as target_modules, left out.
        layers_to_transform: numbers of the layers to adapt; all by default.
        layers_pattern: name of the list of layers, where it is not found by itself.
        modules_to_save: modules to train and save whole, as in PEFT.
        bias: "none"; biases stay frozen.
        bank: settings of the method's experts, for example {"weight_dropout": 0.3}; the rest keeps the method's.
        router: settings of the method's router, for example {"pooling": "mean"}; the rest keeps the method's defaults.
        scope: who shares one router's decision: "module", "block", "layer" or "model"; the method's own by default.
        decision: how a sequence is settled at inference: "last", "vote", "per_layer", "layer:k" or "pinned".
        backend: "auto", or one of `experts.apply.BACKENDS`.
        abstention: a calibration, written by `loramix calibrate`; None: every prompt gets an expert.
        schema_version: version of the file format; set by loramix.

    Raises:
        ConfigError: with all problems found.
    """

    task_type: str | None = "CAUSAL_LM"
    method: str = "moa"
    experts: list[str] | None = None
    num_experts: int | None = None
    allocation: str | list[int] | None = None
    domains: list[str] | None = None
    r: int | None = None
    lora_alpha: int | None = None
    lora_dropout: float | None = None
    use_rslora: bool = False
    init_lora_weights: bool = True
    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    modules_to_save: list[str] | None = None
    bias: str = "none"
    bank: dict[str, Any] | None = None
    router: dict[str, Any] | None = None
    scope: str | None = None
    decision: str | None = None
    backend: str = "auto"
    abstention: dict[str, Any] | None = None
    schema_version: int = field(default=SCHEMA_VERSION)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = LORAMIX
        problems = Problems("the adapter's settings")
        try:
            method = method_named(self.method)
        except LoramixError as error:
            problems.add(str(error))
            method = method_named("lora")
        else:
            if method.tuner != "loramix":
                problems.add(
                    f"method {method.name} is no loramix adapter ({method.summary}). Train it with `loramix train`, or "
                    "choose another method here."
                )
                method = method_named("lora")
        self._take_defaults(method)
        self._check_numbers(problems)
        if self.method == method.name:
            self._name_experts(method, problems)
            self._resolve_bank(method, problems)
            self._resolve_router(method, problems)
            router = self.router_config()
            for problem in (
                *backend_problems(self.backend, self.method, router, self.r, self.rank),
                *abstention_problems(self.abstention, method, self.router),
            ):
                problems.add(problem)
        problems.raise_as(ConfigError)

    def _take_defaults(self, method: Method) -> None:
        """Fills what the user left open with the method's own values, then loramix's."""
        defaults = {"r": 8, "lora_alpha": 16, "lora_dropout": 0.0, "target_modules": "all-linear", **method.defaults}
        if self.experts is not None or self.num_experts is not None:
            for name in ("num_experts", "allocation"):
                defaults.pop(name, None)
        elif self.allocation not in (None, "uniform"):
            defaults.pop("num_experts", None)
        for name, value in defaults.items():
            if getattr(self, name) is None:
                setattr(self, name, value)
        if isinstance(self.target_modules, list):
            self.target_modules = set(self.target_modules)  # type: ignore[assignment]  # PEFT keeps it as a set
        if isinstance(self.exclude_modules, list):
            self.exclude_modules = set(self.exclude_modules)  # type: ignore[assignment]

    def _check_numbers(self, problems: Problems) -> None:
        assert self.r is not None
        assert self.lora_alpha is not None
        assert self.lora_dropout is not None
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
        if wrong := allocation_problem(self.allocation):
            problems.add(wrong)
            self.allocation = None
        by_layer = self.allocation not in (None, "uniform")
        if by_layer and method.expert_count != "chosen":
            problems.add(
                f"allocation = {self.allocation!r}: method {method.name} has one expert for each name. Leave it out."
            )
            by_layer = False
        if self.experts is None:
            known = extremes(self.allocation, 0)[1] if by_layer else self.num_experts
            count = known if known is not None else (1 if method.expert_count == "one" else 0)
            self.experts = ["default"] if count == 1 else [f"expert_{e}" for e in range(count)]
        if self.num_experts is not None and self.num_experts != len(self.experts):
            problems.add(
                f"num_experts = {self.num_experts}, but experts or allocation name {len(self.experts)}. Leave "
                "num_experts out."
            )
        self.num_experts = len(self.experts)
        if by_layer and extremes(self.allocation, 0)[1] != len(self.experts):
            problems.add(f"experts names {len(self.experts)}, but allocation = {self.allocation!r}. Leave experts out.")
        for problem in name_problems(self.experts, method):
            problems.add(problem)
        if method.expert_count == "one" and len(self.experts) != 1:
            problems.add(f"method {method.name} has one expert, but {len(self.experts)} are named. Name one.")
        if method.expert_count == "one per domain" and len(self.experts) < 2:
            problems.add(
                f"method {method.name} mixes one expert per domain, but {len(self.experts)} are named. Set experts to "
                "the names of at least two domains."
            )
        if not self.experts:
            problems.add(f"num_experts: missing or 0. Method {method.name} needs a number of experts here; set it.")

    def _resolve_bank(self, method: Method, problems: Problems) -> None:
        bank = self._overridden("bank", method.bank, problems)
        for problem in bank.problems():
            problems.add(problem)
        if bank.share is not None and method.starts_from_experts:
            problems.add(f"bank.share = {bank.share!r}: method {method.name} starts from whole experts. Leave it out.")
        if (bank.combine == "matrices") != (method.bank.combine == "matrices"):
            problems.add(f"bank.combine = {bank.combine!r}: belongs to the method (lorahub). Leave it out.")
        if bank.split_rank and self.experts and self.r is not None and self.r % len(self.experts):
            problems.add(f"r = {self.r} is shared by {len(self.experts)} experts. Expected a multiple of their number.")
        self.bank = asdict(bank)

    def _resolve_router(self, method: Method, problems: Problems) -> None:
        if method.router is None:
            for name in ("router", "decision", "scope"):
                if getattr(self, name):
                    problems.add(
                        f"{name} = {getattr(self, name)!r}: method {method.name} routes nothing. Leave it out."
                    )
            return
        kind = (self.router or {}).get("kind", method.router.kind)
        if kind != method.router.kind:
            problems.add(f"router.kind = {kind!r}: method {method.name} has a {method.router.kind} router.")
        resolved = self._overridden("router", method.router, problems)
        if self.experts:
            for problem in resolved.problems(extremes(self.allocation, len(self.experts))[0]):
                problems.add(problem)
        self.router = asdict(resolved)
        self._resolve_scope(method, problems)
        if resolved.settled_by == "domain" and not self.domains:
            problems.add(f"domains: missing. Method {method.name} is told the domain of each row; name them in order.")
        if resolved.settled_by != "prompt":
            if self.decision is not None:
                problems.add(f"decision = {self.decision!r}: method {method.name} settles no sequence. Leave it out.")
            return
        if self.decision is None:
            self.decision = str(method.decision)
        if wrong := decision_problem(str(self.decision)):
            problems.add(wrong)

    def _resolve_scope(self, method: Method, problems: Problems) -> None:
        self.scope = self.scope or method.scope
        scopes = ("module", "block", "layer", "model")
        if self.scope not in scopes:
            problems.add(f"scope = {self.scope!r}: expected one of {', '.join(scopes)}.")
        elif self.scope != method.scope and (method.decision or method.whole_ffn or method.bank.combine == "matrices"):
            problems.add(
                f"scope = {self.scope!r}: method {method.name} is defined with scope {method.scope}. Leave it out."
            )
        elif self.scope == "model" and self.allocation not in (None, "uniform"):
            problems.add(
                "scope = 'model' has one decision for all layers, but allocation gives them different numbers."
            )

    def _overridden(self, name: str, default: Any, problems: Problems) -> Any:
        """Returns a frozen value of the method with the user's settings of the same name put over it."""
        accepted, wrong = accepted_settings(name, default, getattr(self, name) or {})
        for problem in wrong:
            problems.add(problem)
        return replace(default, **accepted)

    def router_config(self) -> RouterConfig | None:
        """Returns the router's settings as the frozen value that builds it, or None for a method without router."""
        default: Any = method_named(self.method).router
        if default is None:
            return None
        resolved: RouterConfig = replace(default, **(self.router or {}))
        return resolved

    def bank_config(self) -> BankConfig:
        """Returns the form of the banks."""
        return BankConfig(**(self.bank or {}))

    def abstention_config(self) -> AbstentionConfig | None:
        """Returns the calibration as a value, or None for an adapter without one."""
        return AbstentionConfig(**self.abstention) if self.abstention else None

    @property
    def rank(self) -> int:
        """Rank of one expert."""
        assert self.r is not None
        return self.r // len(self.experts or [""]) if self.bank_config().split_rank else self.r

    @property
    def scaling(self) -> float:
        """Factor of the delta."""
        assert self.r is not None
        assert self.lora_alpha is not None
        return float(self.lora_alpha / (self.r**0.5 if self.use_rslora else self.r))

    def to_dict(self) -> dict[str, Any]:
        """Returns the settings with sets as sorted lists, so that the same adapter gives the same file; without
        `abstention` where nothing was calibrated, as before there was such a thing."""
        given = {k: sorted(v) if isinstance(v, set) else v for k, v in super().to_dict().items()}
        return {k: v for k, v in given.items() if k != "abstention" or v is not None}
