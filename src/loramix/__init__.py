"""loramix: one frozen language model, good at many domains at once, by mixtures of LoRA experts.

`import loramix` makes its methods known to PEFT. The names below are loaded when they are first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from loramix.on_import import register_with_peft

if TYPE_CHECKING:
    from loramix.data.domain_collator import DomainCollator
    from loramix.data.prompts import encode_prompts
    from loramix.errors import ConfigError, DataError, LoramixError, ModelError
    from loramix.methods import METHODS, Method
    from loramix.models import load_base, load_tokenizer
    from loramix.routing import Routing
    from loramix.tuner import LoramixConfig, LoramixModel, Route
    from loramix.tuner.attaching import attach_losses, detach_losses

__version__ = "0.1.0"

_HOMES = {
    "ConfigError": "loramix.errors",
    "DataError": "loramix.errors",
    "DomainCollator": "loramix.data.domain_collator",
    "LoramixConfig": "loramix.tuner",
    "LoramixError": "loramix.errors",
    "LoramixModel": "loramix.tuner",
    "METHODS": "loramix.methods",
    "Method": "loramix.methods",
    "ModelError": "loramix.errors",
    "Route": "loramix.tuner",
    "Routing": "loramix.routing",
    "attach_losses": "loramix.tuner.attaching",
    "detach_losses": "loramix.tuner.attaching",
    "encode_prompts": "loramix.data.prompts",
    "load_base": "loramix.models",
    "load_tokenizer": "loramix.models",
}

__all__ = [
    "METHODS",
    "ConfigError",
    "DataError",
    "DomainCollator",
    "LoramixConfig",
    "LoramixError",
    "LoramixModel",
    "Method",
    "ModelError",
    "Route",
    "Routing",
    "attach_losses",
    "detach_losses",
    "encode_prompts",
    "load_base",
    "load_tokenizer",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'loramix' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


register_with_peft()
