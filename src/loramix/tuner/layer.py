"""The adapted module: a frozen linear layer with a bank of experts for each adapter, and a router if it is a door."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from loramix.errors import ConfigError
from loramix.experts import LoraBank, linear_sizes
from loramix.routing import Call, Routing, RoutingContext
from loramix.tuner.config import LoramixConfig


@dataclass(frozen=True)
class Place:
    """Where a module stands in a mixture.

    Attributes:
        scope: name under which its routing is kept; None where the method routes nothing.
        is_door: whether the router of the scope sits here.
    """

    scope: str | None
    is_door: bool


class LoramixLinear(nn.Module, BaseTunerLayer):
    """y = W0 x + delta(x, routing); W0 frozen, delta by the active adapter's bank.

    Parameter names: `loramix_bank.<adapter>.A_ERI`, `.B_EOR`, and at a door `loramix_router.<adapter>...`.
    """

    adapter_layer_names = ("loramix_bank", "loramix_router")
    other_param_names = ("loramix_places",)

    if TYPE_CHECKING:  # what BaseTunerLayer gives; PEFT has no types
        active_adapters: list[str]
        disable_adapters: bool
        _active_adapter: str | list[str]

        def _move_adapter_to_device_of_base_layer(self, adapter_name: str) -> None: ...

    def __init__(self, base_layer: nn.Module, context: RoutingContext) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.context = context
        self.loramix_bank = nn.ModuleDict()
        self.loramix_router = nn.ModuleDict()
        self.loramix_places: dict[str, Place] = {}
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        sizes = linear_sizes(base_layer)
        assert sizes is not None, "targets are checked before they are replaced"
        self.in_features, self.out_features = sizes

    def update_layer(self, adapter_name: str, config: LoramixConfig, place: Place) -> None:
        """Adds the bank (and the router) of one adapter."""
        assert config.experts is not None
        self.loramix_places[adapter_name] = place
        self.loramix_bank[adapter_name] = LoraBank(
            self.in_features,
            self.out_features,
            num_experts=len(config.experts),
            rank=config.r,
            scaling=config.scaling,
            dropout=config.lora_dropout,
            backend=config.backend,
            init_weights=config.init_lora_weights,
        )
        router = config.router_config()
        if place.is_door and router is not None:
            self.loramix_router[adapter_name] = router.build(self.in_features, len(config.experts))
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

    def routing(self, adapter: str, x_BTI: Tensor, call: Call) -> Routing:
        """Returns the routing this module follows; at the door it is made and kept in the call."""
        scope = self.loramix_places[adapter].scope
        assert scope is not None
        if adapter in self.loramix_router:
            if scope in call.carried:
                call.routings[scope] = call.carried[scope].expanded(x_BTI.shape[0])
            else:
                call.routings[scope] = self.router(adapter)(x_BTI, call, scope)
            self.context.passed(scope)
        return call.routings[scope]

    def read(self, adapter: str, x_BTI: Tensor, call: Call) -> None:
        """Lets the router, if it sits here, take in what the base alone has made of the prompt."""
        scope = self.loramix_places[adapter].scope
        if adapter in self.loramix_router and scope is not None:
            call.pooled[scope] = self.router(adapter).pool(x_BTI, call.prompt_mask_BT)
            self.context.passed(scope)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """x: (B, T, I), or (N, I) where the model flattens its tokens. Returns the same shape with O features."""
        y: Tensor = self.base_layer(x, *args, **kwargs)
        adapter = self.active_adapters[0] if self.active_adapters else None
        if self.disable_adapters or adapter is None or adapter not in self.loramix_bank:
            return y
        bank = self.bank(adapter)
        if self.loramix_places[adapter].scope is None:
            x_BTI, y_BTO = (x, y) if x.dim() == 3 else (x[None], y[None])
            added: Tensor = bank(y_BTO, x_BTI, _only_expert(x_BTI))
            return added.view_as(y)
        call = self.context.current()
        shape = call.mask_BT.shape
        x_BTI, y_BTO = (x, y) if x.dim() == 3 else (x.view(*shape, -1), y.view(*shape, -1))
        if call.base_only:
            self.read(adapter, x_BTI, call)
            return y
        added = bank(y_BTO, x_BTI, self.routing(adapter, x_BTI, call))
        return added.view_as(y)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        raise ConfigError(
            "merge: a routed mixture depends on its input and cannot be folded into the base's weights; for a single "
            "expert it is not built yet. Keep the adapter beside the base."
        )

    def unmerge(self) -> None:
        raise ConfigError("unmerge: loramix adapters are never merged.")

    def __repr__(self) -> str:
        return "loramix." + super().__repr__()


def _only_expert(x_BTI: Tensor) -> Routing:
    """Returns the routing of a method without router: expert 0 with weight 1 for every row."""
    rows = x_BTI.shape[0]
    return Routing(
        ids=torch.zeros(rows, 1, dtype=torch.int64, device=x_BTI.device),
        weights=x_BTI.new_ones(rows, 1),
        logits=None,
        level="sequence",
        mask=torch.ones(rows, dtype=torch.bool, device=x_BTI.device),
    )
