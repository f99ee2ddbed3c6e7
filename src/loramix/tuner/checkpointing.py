"""Activation checkpointing that recomputes with the routing of the forward it belongs to.

A checkpointed layer runs again in the backward pass, after the forward that told it its domains has ended. Left to a
shared holder it would then follow whatever forward came last: with two forwards before one backward the gradients are
silently wrong. torch's own remedy is `context_fn`: it is called at forward time, where the current call is copied, and
re-entered at recompute, where the copy is put back.

The reentrant form has no such door and cuts the graph of the routers, so it is refused for methods that route.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint

from loramix.errors import ConfigError
from loramix.routing import Call, RoutingContext

Contexts = tuple[AbstractContextManager[Any], AbstractContextManager[Any]]


class CheckpointGuard:
    """Stands in for a model's `_set_gradient_checkpointing`, through which both of transformers' names for enabling
    activation checkpointing go, and adds `context_fn` to the function it sets."""

    replaces = "_set_gradient_checkpointing"

    def __init__(self, model: nn.Module, context: RoutingContext) -> None:
        self.model = model
        self.context = context
        self.routes = False

    def install(self) -> None:
        """Takes the place of the model's method; checkpointing that is on already is guarded too."""
        if not hasattr(self.model, self.replaces):
            return
        setattr(self.model, self.replaces, self)
        for module in self.model.modules():
            if getattr(module, "gradient_checkpointing", False) and hasattr(module, "_gradient_checkpointing_func"):
                module._gradient_checkpointing_func = self.guarded(module._gradient_checkpointing_func)  # type: ignore[assignment,arg-type]

    def __call__(
        self,
        enable: bool = True,
        gradient_checkpointing_func: Callable[..., Any] = checkpoint,
        every_n_layers: int = 1,
    ) -> None:
        type(self.model)._set_gradient_checkpointing(  # type: ignore[attr-defined]
            self.model,
            enable=enable,
            gradient_checkpointing_func=self.guarded(gradient_checkpointing_func) if enable else checkpoint,
            every_n_layers=every_n_layers,
        )

    def guarded(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Returns `function` with our `context_fn` around any it has.

        Raises:
            ConfigError: it is reentrant, and a router would lose its gradient.
        """
        given = dict(getattr(function, "keywords", {}))
        if isinstance(given.get("context_fn"), _Remembering):
            return function
        if given.get("use_reentrant", False):
            if not self.routes:
                return function
            raise ConfigError(
                "activation checkpointing was asked for with use_reentrant=True. It cuts the routers out of the graph "
                "(their gradient is lost without a word). Pass activation_checkpointing_kwargs={'use_reentrant': "
                "False}."
            )
        remembering = _Remembering(self.context, given.get("context_fn"))
        plain = function.func if isinstance(function, partial) else function
        return partial(plain, **{**given, "use_reentrant": False, "context_fn": remembering})


class _Remembering:
    """A `context_fn`: copies the current call at forward time and puts it back for the recomputation."""

    def __init__(self, context: RoutingContext, inner: Callable[[], Contexts] | None) -> None:
        self.context = context
        self.inner = inner

    def __call__(self) -> Contexts:
        remembered = self.context.call.snapshot() if self.context.call is not None else None
        forward, recompute = self.inner() if self.inner is not None else (nullcontext(), nullcontext())
        return forward, self.put_back(remembered, recompute)

    @contextmanager
    def put_back(self, remembered: Call | None, recompute: AbstractContextManager[Any]) -> Iterator[None]:
        now = self.context.call
        self.context.call = remembered
        try:
            with recompute:
                yield
        finally:
            self.context.call = now
