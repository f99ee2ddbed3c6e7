"""Makes LORAMIX a PEFT method.

PEFT's `register_peft_method` accepts only names that are already members of its `PeftType` enum (0.21), so the enum is
given one more member first. Code that does not know loramix then fails loudly (`KeyError: 'LORAMIX'`) instead of
loading an adapter as something else.
"""

from __future__ import annotations

from typing import Any

from peft.utils import PeftType, register_peft_method

NAME = "loramix"
PREFIX = "loramix_"


def _peft_type(name: str) -> Any:
    """Returns the member of PeftType with that name, made if it is missing."""
    if name in PeftType._member_map_:
        return PeftType[name]
    member = str.__new__(PeftType, name)
    member._name_ = name
    member._value_ = name
    PeftType._member_map_[name] = member
    PeftType._value2member_map_[name] = member
    PeftType._member_names_.append(name)
    type.__setattr__(PeftType, name, member)
    return member


LORAMIX = _peft_type(NAME.upper())


def register() -> None:
    """Registers the method with PEFT; does nothing the second time."""
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    from loramix.tuner.config import LoramixConfig
    from loramix.tuner.model import LoramixModel

    if LORAMIX not in PEFT_TYPE_TO_CONFIG_MAPPING:
        register_peft_method(name=NAME, config_cls=LoramixConfig, model_cls=LoramixModel, prefix=PREFIX)
