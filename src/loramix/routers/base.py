"""What every router is: a module that maps hidden states to a Routing."""

from __future__ import annotations

from typing import Any, ClassVar, Protocol, runtime_checkable

from torch import Tensor, nn

from loramix.routing import Call, Level, Routing


class Router(Protocol):
    """A router sits at the door of its scope (the first adapted module of a layer, for example).

    It is given that module's input, the call and its scope, and returns the Routing that all experts there follow.
    """

    def __call__(self, x_BTI: Tensor, call: Call, scope: str) -> Routing: ...


@runtime_checkable
class RouterConfig(Protocol):
    """A frozen dataclass that describes a router and builds it."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def kind(self) -> str: ...

    @property
    def level(self) -> Level: ...

    @property
    def reads_base(self) -> bool: ...

    def build(self, in_features: int, num_experts: int) -> nn.Module: ...

    def problems(self) -> list[str]: ...
