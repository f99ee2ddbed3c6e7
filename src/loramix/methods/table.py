"""The one visible table of methods."""

from __future__ import annotations

from loramix.errors import ConfigError, did_you_mean
from loramix.methods.base import Method
from loramix.methods.lora import LORA
from loramix.methods.moa import MOA

METHODS: dict[str, Method] = {method.name: method for method in (LORA, MOA)}


def method_named(name: str) -> Method:
    """Returns the method of that name.

    Raises:
        ConfigError: there is none; the known names are listed.
    """
    if name not in METHODS:
        raise ConfigError(
            f"method = {name!r}: no such method. Expected one of {', '.join(METHODS)}.{did_you_mean(name, METHODS)}"
        )
    return METHODS[name]
