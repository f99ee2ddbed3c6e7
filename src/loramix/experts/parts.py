"""Frozen layers that read one input, each with its experts: what each gives, and which of them share one function."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from loramix.experts.apply import BACKENDS, gates_by_token
from loramix.experts.by_channel import ByChannel
from loramix.experts.by_segment import ByRows, weights_by_token
from loramix.experts.dropping import InputDropout
from loramix.experts.fused import Layer, can_fuse, fused
from loramix.routing import Routing


@dataclass(frozen=True, eq=False)
class Part:
    """A frozen layer and its experts as one forward uses them.

    Attributes:
        base_layer: the frozen layer.
        A_ERI, B_EOR: the experts.
        routing: of the tokens to them.
        backend: a name in `experts.apply.BACKENDS`.
        free: whether the backend was left to us: one asked for by name is taken.
        scaling: s.
        dropout: on what the experts read.
    """

    base_layer: Callable[..., Tensor]
    A_ERI: Tensor
    B_EOR: Tensor
    routing: Routing
    backend: str
    free: bool
    scaling: float
    dropout: InputDropout

    @property
    def by_rows(self) -> bool:
        """Whether experts are those of whole rows that lie one after the other."""
        return self.backend == "per_sequence" and self.routing.segments is not None

    def fuses(self, x_BTI: Tensor) -> bool:
        """Whether the frozen layer's product and its experts' can be one function."""
        laid_out = self.backend == "concat" or self.by_rows
        return self.free and laid_out and can_fuse(self.base_layer, x_BTI, self.A_ERI)

    def goes_with(self, other: Part) -> bool:
        """Whether two that fuse can be one function: experts laid out alike, the same numbers of x dropped."""
        alike = self.by_rows == other.by_rows and self.A_ERI.dtype == other.A_ERI.dtype
        drops = [(one.dropout.p, one.dropout.training) for one in (self, other)]
        return alike and drops[0] == drops[1] and (not self.by_rows or self.routing is other.routing)

    def plainly(self, x_BTI: Tensor) -> Tensor:
        """Returns base_layer(x) with the experts' delta added by the backend, in the frozen layer's type."""
        y_BTO = self.base_layer(x_BTI)
        dropped_BTI = self.dropout(x_BTI.to(self.A_ERI.dtype))
        y = y_BTO.to(dropped_BTI.dtype)
        added = BACKENDS[self.backend](y, dropped_BTI, self.A_ERI, self.B_EOR, self.routing, self.scaling)
        return added.to(y_BTO.dtype)


def outputs_of(parts: Sequence[Part], x_BTI: Tensor) -> list[Tensor]:
    """Returns what each part makes of the same x, (B, T, O). Those that can be one function are, and drop the same
    numbers of x."""
    found: dict[int, Tensor] = {}
    for place, part in enumerate(parts):
        if place in found:
            continue
        if not part.fuses(x_BTI):
            found[place] = part.plainly(x_BTI)
            continue
        later = range(place + 1, len(parts))
        others = [k for k in later if k not in found and parts[k].fuses(x_BTI) and parts[k].goes_with(part)]
        group = [place, *others]
        found |= dict(zip(group, _fused([parts[k] for k in group], x_BTI), strict=True))
    return [found[place] for place in range(len(parts))]


def _fused(parts: Sequence[Part], x_BTI: Tensor) -> list[Tensor]:
    first = parts[0]
    keep_BTI = first.dropout.draw(x_BTI)
    layers = []
    for part in parts:
        assert isinstance(part.base_layer, nn.Linear)
        if part.by_rows:
            gates: Tensor | None = weights_by_token(part.routing, part.A_ERI)
        else:
            experts = max(len(part.A_ERI), len(part.B_EOR))
            gates = gates_by_token(x_BTI, part.routing, experts, part.A_ERI.dtype)
        scaling = part.scaling * part.dropout.factor
        layers.append(Layer(part.A_ERI, part.B_EOR, gates, scaling, part.base_layer))
    keep_NI = None if keep_BTI is None else keep_BTI.flatten(0, -2)
    way = ByRows.of(first.routing) if first.by_rows else ByChannel()
    outputs = fused(layers, x_BTI.flatten(0, -2), keep_NI, way)
    return [out_NO.view(*x_BTI.shape[:-1], out_NO.shape[1]) for out_NO in outputs]
