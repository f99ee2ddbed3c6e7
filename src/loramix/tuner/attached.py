"""The method's auxiliary losses in trainers that know nothing of them.

A trainer takes the loss that a model returns, or makes one from its outputs; what routers must learn beside it, it has
no place for. So the auxiliary losses are hung on what the forward returns: its value stays, and where the backward pass
comes by, their gradient is added. Megatron-LM carries the balance loss of its experts so
(`MoEAuxLossAutoScaler`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from loramix.errors import ConfigError, Problems
from loramix.losses import AUXILIARY, Seen
from loramix.methods import method_named
from loramix.routing import Call
from loramix.tuner.config import LoramixConfig

CARRIERS = ("log_probs", "loss", "logits")
"""What of an output a trainer goes on from, the first that is there: TRL takes `log_probs` and leaves the `loss` beside
it alone, Trainer takes `loss`, a loop of one's own without labels `logits`."""


class _Carry(torch.autograd.Function):
    """Returns its first input; in the backward pass the second gets a gradient of 1."""

    @staticmethod
    def forward(ctx: Any, carrier: Tensor, auxiliary: Tensor) -> Tensor:
        ctx.like = auxiliary.dtype
        # Trainer scales a loss in place, which autograd refuses on a view; logits are too large to be copied.
        return carrier.clone() if carrier.dim() == 0 else carrier.view_as(carrier)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        return gradient, torch.ones((), dtype=ctx.like, device=gradient.device)


class AttachedLosses:
    """The losses of one adapter, hung on its training forwards.

    Args:
        config: of the adapter.
        weights: by name, over the method's own; 0 leaves a loss out.
        accumulation: micro-batches of an optimizer step; each gives its part.
        kinds: for losses that tell two kinds of data apart, the kind of each domain, 0 or 1.

    Attributes:
        values: what each loss was in the last training forward, for a log.

    Raises:
        ConfigError: a loss that the method has nothing for; an accumulation below 1; kinds that are missing.
    """

    def __init__(
        self,
        config: LoramixConfig,
        weights: Mapping[str, float] | None,
        accumulation: int,
        kinds: Sequence[int] | None,
    ) -> None:
        method = method_named(config.method)
        problems = Problems("attach_losses")
        for name in (weights or {}).keys() - method.possible_losses:
            possible = ", ".join(sorted(method.possible_losses)) or "none"
            problems.add(f"weights: {name}: method {method.name} has nothing to apply it to. Possible: {possible}.")
        if accumulation < 1:
            problems.add(f"accumulation = {accumulation}: expected the micro-batches of a step, 1 or more.")
        wanted = {name: float(weight) for name, weight in {**method.losses, **(weights or {})}.items() if weight > 0}
        if kinds is None and {"localized_balance", "localized_balance_cv"} & wanted.keys():
            problems.add(f"kinds: missing. Method {method.name} tells two kinds of data apart: 0 or 1 for each domain.")
        problems.raise_as(ConfigError)
        self.weights = wanted
        self.accumulation = accumulation
        self.kinds = kinds
        self.values: dict[str, Tensor] = {}

    def onto(self, output: Any, call: Call) -> Any:
        """Returns a forward's output with the losses hung on it.

        Args:
            output: of the base: a ModelOutput, or a tuple whose first is its loss or logits.
            call: of the forward, with its routings.

        Raises:
            ConfigError: a loss needs the rows' labels and the forward got none; or the output has nothing to carry it.
        """
        if not self.weights:
            return output
        if call.labels_B is None and any(AUXILIARY[name].needs == "labels" for name in self.weights):
            raise ConfigError(
                f"attached losses ({', '.join(self.weights)}) need the domain of each row, but the forward got no "
                "domain_ids. Keep the domain column: loramix.DomainCollator puts it into the batch."
            )
        rows = call.rows
        labels_B = call.labels_B if call.labels_B is not None else torch.zeros(rows, dtype=torch.int64)
        kinds = torch.tensor(list(self.kinds or [0] * (int(labels_B.max()) + 1)), device=labels_B.device)
        seen = Seen(call.routings, call.outputs, labels_B, kinds[labels_B])
        values = {name: AUXILIARY[name].value(seen) for name in self.weights}
        self.values = {name: value.detach() for name, value in values.items()}
        total = torch.stack([self.weights[name] * value for name, value in values.items()]).sum() / self.accumulation
        return _carried(output, total)


def _carried(output: Any, total: Tensor) -> Any:
    if isinstance(output, tuple) and not hasattr(output, "keys"):
        first = _Carry.apply(output[0], total)  # type: ignore[no-untyped-call]
        return (first, *output[1:])
    for name in CARRIERS:
        if isinstance(carrier := output.get(name), Tensor):
            output[name] = _Carry.apply(carrier, total)  # type: ignore[no-untyped-call]
            return output
    raise ConfigError(
        f"attached losses found none of {', '.join(CARRIERS)} in what the base returned ({', '.join(output)}). Take "
        "the losses from loramix.losses and model.routings, and add them yourself."
    )
