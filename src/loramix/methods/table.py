"""The one visible table of methods."""

from __future__ import annotations

from loramix.errors import ConfigError, did_you_mean
from loramix.methods.arrow import ARROW
from loramix.methods.base import Method
from loramix.methods.full import FULL
from loramix.methods.hydralora import HYDRALORA
from loramix.methods.llava_mole import LLAVA_MOLE
from loramix.methods.lora import LORA
from loramix.methods.lorahub import LORAHUB
from loramix.methods.loramoe import LORAMOE
from loramix.methods.mixlora import MIXLORA
from loramix.methods.moa import MOA
from loramix.methods.moe_lora import MOE_LORA
from loramix.methods.moe_lora_naive import MOE_LORA_NAIVE
from loramix.methods.moelora_contrastive import MOELORA_CONTRASTIVE
from loramix.methods.moelora_task import MOELORA_TASK
from loramix.methods.mola import MOLA
from loramix.methods.mole import MOLE
from loramix.methods.molora import MOLORA
from loramix.methods.mosl import MOSL
from loramix.methods.mosld import MOSLD
from loramix.methods.mosld_b import MOSLD_B
from loramix.methods.prefix import PREFIX
from loramix.methods.sira import SIRA

METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        FULL,
        PREFIX,
        LORA,
        MOA,
        MOE_LORA,
        MOE_LORA_NAIVE,
        MOSLD,
        MOSL,
        MOSLD_B,
        MOLORA,
        SIRA,
        MOLA,
        MIXLORA,
        HYDRALORA,
        LORAMOE,
        MOELORA_TASK,
        MOELORA_CONTRASTIVE,
        LLAVA_MOLE,
        MOLE,
        ARROW,
        LORAHUB,
    )
}


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
