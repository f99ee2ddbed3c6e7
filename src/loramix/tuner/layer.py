"""The adapted module: a frozen linear layer with a bank of experts for each adapter, and a router if it is a door."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn

from loramix.errors import ConfigError, ModelError
from loramix.experts import LoraBank, linear_sizes, one_expert, outputs_of
from loramix.experts.fold import delta, fold_problem, with_delta
from loramix.methods import method_named
from loramix.precision import without_autocast
from loramix.routers import Site
from loramix.routing import Ahead, Call, Routing, RoutingContext
from loramix.tuner.config import LoramixConfig
from loramix.tuner.places import Place


class LoramixLinear(nn.Module, BaseTunerLayer):
    """y = W0 x + delta(x, routing); W0 frozen, delta by the active adapter's bank.

    Parameter names: `loramix_bank.<adapter>.A_ERI`, `.B_EOR`, and at a door `loramix_router.<adapter>...`.
    """

    adapter_layer_names = ("loramix_bank", "loramix_router")
    other_param_names = ("loramix_places", "loramix_trains", "loramix_methods")

    if TYPE_CHECKING:  # what BaseTunerLayer gives; PEFT has no types
        active_adapters: list[str]
        disable_adapters: bool
        merged: bool
        _active_adapter: str | list[str]

        def get_base_layer(self) -> nn.Module: ...
        def _move_adapter_to_device_of_base_layer(self, adapter_name: str) -> None: ...

    def __init__(self, base_layer: nn.Module, context: RoutingContext, name: str) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.name = name
        self.context = context
        self.loramix_bank = nn.ModuleDict()
        self.loramix_router = nn.ModuleDict()
        self.loramix_places: dict[str, Place] = {}
        self.loramix_trains: dict[str, tuple[str, ...]] = {}
        self.loramix_methods: dict[str, str] = {}
        self.followers: tuple[LoramixLinear, ...] = ()
        """Modules that read the same input right after this one, which then works for them too (shared_inputs)."""
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        sizes = linear_sizes(base_layer)
        assert sizes is not None, "targets are checked before they are replaced"
        self.in_features, self.out_features = sizes

    def update_layer(self, adapter_name: str, config: LoramixConfig, place: Place) -> None:
        """Adds the bank (and the router) of one adapter."""
        self.loramix_places[adapter_name] = place
        self.loramix_trains[adapter_name] = method_named(config.method).trains
        self.loramix_methods[adapter_name] = config.method
        routed = place.scope is not None
        self.loramix_bank[adapter_name] = LoraBank(
            self.in_features,
            self.out_features,
            num_experts=place.num_experts,
            rank=config.rank if routed else int(config.r or 0),
            scaling=config.scaling,
            form=config.bank_config() if routed else None,
            dropout=float(config.lora_dropout or 0),
            backend=config.backend if routed else "auto",
            init_weights=config.init_lora_weights,
        )
        router = config.router_config()
        if place.is_door and router is not None:
            site = Site(self.in_features, self.out_features, place.num_experts, len(config.domains or []))
            self.loramix_router[adapter_name] = built = router.build(site)
            calibration = config.abstention_config()
            if calibration is not None and calibration.layer == place.scope:
                built.abstention = calibration.build(site)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def bank(self, adapter: str) -> LoraBank:
        """Returns the experts of an adapter."""
        return cast(LoraBank, self.loramix_bank[adapter])

    def router(self, adapter: str) -> Any:
        """Returns the router of an adapter whose scope begins here."""
        return self.loramix_router[adapter]

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """Sets the active adapter.

        Raises:
            ConfigError: more than one; a routing speaks of the experts of one mixture.
        """
        if not isinstance(adapter_names, str) and len(adapter_names) > 1:
            raise ConfigError(
                f"{len(adapter_names)} adapters were made active at once ({', '.join(adapter_names)}). loramix runs "
                "one mixture at a time: a routing names the experts of one. Set one, or put all experts in one mixture."
            )
        super().set_adapter(adapter_names, inference_mode)
        self._freeze_what_never_trains()

    def set_requires_grad(self, adapter_names: Any, requires_grad: bool = True) -> None:
        """As PEFT's; experts of a method that only routes trained ones stay frozen."""
        super().set_requires_grad(adapter_names, requires_grad)
        self._freeze_what_never_trains()

    def _freeze_what_never_trains(self) -> None:
        for adapter, bank in self.loramix_bank.items():
            if "experts" not in self.loramix_trains[adapter]:
                bank.requires_grad_(False)

    def routing(self, adapter: str, x_BTI: Tensor, call: Call) -> Routing:
        """Returns the routing this module follows; at the door it is made and kept in the call."""
        scope = self.loramix_places[adapter].scope
        assert scope is not None
        if adapter in self.loramix_router:
            if scope in call.carried:
                routing = call.carried[scope].expanded(call.rows)
            else:
                outputs = partial(self.bank(adapter).each_output, x_BTI)
                # Under autocast (bf16: true) a router's scores would be bf16, whatever it asks for.
                with without_autocast(x_BTI):
                    routing = self.router(adapter)(x_BTI, call, scope, outputs)
            call.routings[scope] = routing if call.segments is None else replace(routing, segments=call.segments)
            self.context.passed(scope)
        return call.routings[scope]

    def read(self, adapter: str, x_BTI: Tensor, call: Call) -> None:
        """Lets the router, if it sits here, take in what the base alone has made of the prompt."""
        scope = self.loramix_places[adapter].scope
        if adapter in self.loramix_router and scope is not None:
            call.pooled[scope] = self.router(adapter).pool(x_BTI, call.prompt_mask_BT, call.segments)
            self.context.passed(scope)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """x: (B, T, I), or (N, I) where the model flattens its tokens. Returns the same shape with O features.

        In a feed-forward block whose experts are whole blocks, the first half returns (K, B, T, O), one copy for each
        of a token's experts, and the second half takes that.
        """
        adapter = self.active_adapters[0] if self.active_adapters else None
        if self.disable_adapters and self.merged:
            self.unmerge()
        if self.disable_adapters or self.merged or adapter is None or adapter not in self.loramix_bank:
            y: Tensor = self.base_layer(x, *args, **kwargs)
            return y
        if self.context.ahead and (ahead := self.context.ahead.pop(self.name, None)) is not None and ahead.is_for(x):
            return ahead.y
        bank, place = self.bank(adapter), self.loramix_places[adapter]
        base_layer = partial(self.base_layer, *args, **kwargs) if args or kwargs else self.base_layer
        if place.scope is None:
            x_BTI = x if x.dim() == 3 else x[None]
            return self._added(adapter, base_layer, x, x_BTI, one_expert(x_BTI), None)
        call = self.context.current()
        if place.half == "contract":
            return bank.contract(base_layer, x, call.routings[place.scope].by_token())
        x_BTI = x if x.dim() == 3 else x.view(*call.mask_BT.shape, -1)
        if call.base_only:
            self.read(adapter, x_BTI, call)
            return self.base_layer(x, *args, **kwargs)
        routing = self.routing(adapter, x_BTI, call)
        if place.keeps_outputs and self.training:
            call.outputs[self.name] = bank.sampled_outputs(x_BTI, routing)
        if place.half == "expand":
            return bank.expand(base_layer, x_BTI, routing.by_token())
        return self._added(adapter, base_layer, x, x_BTI, routing, call)

    def _added(
        self, adapter: str, base_layer: Any, x: Tensor, x_BTI: Tensor, routing: Routing, call: Call | None
    ) -> Tensor:
        """Returns base_layer(x) with the delta; what followers make of the same x is kept for them."""
        followers: list[LoramixLinear] = []
        if self.followers and torch.is_grad_enabled():
            followers = [one for one in self.followers if one.follows(adapter, routed=call is not None)]
        parts = [self.bank(adapter).part(base_layer, x_BTI, routing)]
        for one in followers:
            its = routing if call is None else one.routing(adapter, x_BTI, call)
            parts.append(one.bank(adapter).part(one.base_layer, x_BTI, its))
        own, *others = (y_BTO.view(*x.shape[:-1], y_BTO.shape[-1]) for y_BTO in outputs_of(parts, x_BTI))
        for one, y in zip(followers, others, strict=True):
            self.context.ahead[one.name] = Ahead.of(x, y)
        return own

    def follows(self, adapter: str, routed: bool) -> bool:
        """Whether this module may be worked out beside a neighbour that is routed or not: an ordinary one, whose
        adapter is on."""
        if self.disable_adapters or self.merged or self.active_adapters[:1] != [adapter]:
            return False
        place = self.loramix_places.get(adapter)
        return (
            place is not None and (place.scope is not None) == routed and place.half is None and not place.keeps_outputs
        )

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Adds the delta of an adapter that routes nothing to the base's weights, as PEFT's LoRA does.

        Args:
            safe_merge: look for NaN and infinity before anything is changed.
            adapter_names: the active one by default.

        Raises:
            ConfigError: the adapter routes; or the weights are quantised.
            ModelError: with safe_merge, the sum is not finite.
        """
        for adapter in check_adapters_to_merge(self, adapter_names):
            if adapter not in self.loramix_bank:
                continue
            if problem := self.merge_problem(adapter):
                raise ConfigError(f"merge: {problem}")
            weight = with_delta(self.get_base_layer(), self._delta(adapter))
            if safe_merge and not torch.isfinite(weight).all():
                raise ModelError(
                    f"merge: {self.name} would hold NaN or infinity. Adapter {adapter!r} is broken: use an earlier one."
                )
            self.get_base_layer().weight.data = weight
            self.merged_adapters.append(adapter)

    @torch.no_grad()
    def unmerge(self) -> None:
        """Takes out of the base's weights what `merge` added; they are the old ones within rounding."""
        while self.merged_adapters:
            adapter = self.merged_adapters.pop()
            self.get_base_layer().weight.data = with_delta(self.get_base_layer(), -self._delta(adapter))

    def merge_problem(self, adapter: str) -> str | None:
        """Returns why an adapter cannot be merged into this layer's weights, or None."""
        method = self.loramix_methods[adapter]
        if method_named(method).router is not None:
            return (
                f"the routing of method {method} depends on its input, and no single weight matrix equals it. Fold one "
                "expert, or a fixed weighted sum, with `loramix experts merge`; or keep the adapter beside the base."
            )
        problem = fold_problem(self.get_base_layer())
        return None if problem is None else f"{self.name} {problem}"

    def _delta(self, adapter: str) -> Tensor:
        bank = self.bank(adapter)
        return delta(bank.A_ERI[0], bank.B_EOR[0], bank.scaling)

    def __repr__(self) -> str:
        return "loramix." + super().__repr__()
