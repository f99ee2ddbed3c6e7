"""The names of what is served, and who may use which."""

from __future__ import annotations

import time
from collections.abc import Sequence

from loramix.serving.ask import EngineError
from loramix.serving.keys import Key
from loramix.serving.replies import Model
from loramix.tuner.abstaining import BASE


class Catalog:
    """What a request may name as its model: the mixture, an expert of it, or the base.

    Args:
        name: of the mixture.
        experts: that can be named, in order.
        has_base: whether the base can be asked alone.
    """

    def __init__(self, name: str, experts: Sequence[str], *, has_base: bool) -> None:
        self.name = name
        self._experts = tuple(experts)
        self._pins = (*experts, *([BASE] if has_base else []))
        self._created = int(time.time())

    def listed(self, key: Key | None) -> list[Model]:
        """Returns all that a key may name."""
        whole = Model(id=self.name, created=self._created, parent=None, kind="mixture")
        return [whole] + [
            Model(
                id=f"{self.name}:{pin}",
                created=self._created,
                parent=self.name,
                kind="base" if pin == BASE else "expert",
            )
            for pin in self._pins
            if _may(key, pin)
        ]

    def expert(self, model: str, key: Key | None) -> str | None:
        """Returns the expert that a model's name pins, "base", or None for the mixture.

        Raises:
            EngineError: there is no such model, or none that the key may use.
        """
        name, colon, pin = model.partition(":")
        if name == self.name and not colon:
            return None
        if name == self.name and pin in self._pins and _may(key, pin):
            return pin
        there = ", ".join(one.id for one in self.listed(key))
        raise EngineError(f"There is no model {model!r} for this key. Expected one of {there}.", 404)

    def allowed(self, key: Key | None) -> frozenset[str] | None:
        """Returns the experts that may answer a key's requests, or None for all."""
        return None if key is None else key.experts


def _may(key: Key | None, pin: str) -> bool:
    return key is None or key.experts is None or pin in key.experts
