"""The only place that touches PEFT's and transformers' internals. Importing it registers the PEFT method."""

from loramix.tuner.config import LoramixConfig
from loramix.tuner.fit import check_fit
from loramix.tuner.model import LoramixModel
from loramix.tuner.registration import register
from loramix.tuner.routes import Route

register()

__all__ = ["LoramixConfig", "LoramixModel", "Route", "check_fit"]
