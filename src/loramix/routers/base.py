"""What every router is: a module that maps hidden states to a Routing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from loramix.routing import Call, Level, Routing

SettledBy = Literal["prompt", "domain", "nothing"]
"""What a routing follows from beside the tokens at hand: the prompt as a whole, settled once for a sequence and held
while it is continued; the domain the caller names; or nothing, each token on its own."""


@dataclass(frozen=True)
class Site:
    """Where a router is built.

    Attributes:
        inputs, outputs: I and O of the module at whose door it sits.
        experts: E.
        domains: how many domains there are, for routers that are told which.
    """

    inputs: int
    outputs: int
    experts: int
    domains: int = 0


class Router(Protocol):
    """A router sits at the door of its scope (the first adapted module of a layer, for example).

    It is given that module's input, the call, its scope and a function that returns what each expert of that module
    makes of the input, (B, T, E, O); it returns the Routing that all experts of the scope follow.
    """

    def __call__(self, x_BTI: Tensor, call: Call, scope: str, outputs: Callable[[], Tensor]) -> Routing: ...


@runtime_checkable
class RouterConfig(Protocol):
    """A frozen dataclass that describes a router and builds it."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def kind(self) -> str: ...

    @property
    def level(self) -> Level: ...

    @property
    def settled_by(self) -> SettledBy: ...

    @property
    def in_parts(self) -> bool:
        """Whether a row may be read in parts, with a key-value cache between them, and is routed as if read at once: no
        token's routing follows from later tokens, or from what this forward alone has seen."""
        ...

    def build(self, site: Site) -> nn.Module: ...

    def problems(self, fewest_experts: int) -> list[str]: ...


def top_k_problems(top_k: int, fewest_experts: int) -> list[str]:
    """Returns what is wrong with the number of experts chosen, given the experts of the layer that has fewest."""
    if 1 <= top_k <= fewest_experts:
        return []
    return [f"router.top_k = {top_k}: expected 1 to {fewest_experts}, the experts of the layer that has fewest."]


def new_weight(rows: int, columns: int, std: float | None = None) -> nn.Parameter:
    """Returns a router matrix (rows, columns), normal with `std`, or Kaiming-uniform as nn.Linear has it.

    A plain parameter and not nn.Linear: transformers re-initialises nn.Linear modules that it finds unloaded.
    """
    weight = nn.Parameter(torch.empty(rows, columns))
    if not weight.is_meta:
        if std is None:
            nn.init.kaiming_uniform_(weight, a=5**0.5)
        else:
            nn.init.normal_(weight, std=std)
    return weight
