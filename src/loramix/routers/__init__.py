"""Where does a token, or a sequence, go? One file for each kind of router, one Protocol for all."""

from loramix.routers.base import Router, RouterConfig, SettledBy, Site
from loramix.routers.capacity import CapacityRouterConfig
from loramix.routers.constant import ConstantRouterConfig
from loramix.routers.gate import GateRouterConfig
from loramix.routers.prototype import PrototypeRouterConfig
from loramix.routers.sequence import SequenceRouter, SequenceRouterConfig
from loramix.routers.soft import SoftRouterConfig
from loramix.routers.task import TaskRouterConfig
from loramix.routers.topk import TopKRouterConfig

__all__ = [
    "CapacityRouterConfig",
    "ConstantRouterConfig",
    "GateRouterConfig",
    "PrototypeRouterConfig",
    "Router",
    "RouterConfig",
    "SequenceRouter",
    "SequenceRouterConfig",
    "SettledBy",
    "Site",
    "SoftRouterConfig",
    "TaskRouterConfig",
    "TopKRouterConfig",
]
