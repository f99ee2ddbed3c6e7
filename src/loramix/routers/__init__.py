"""Where does a token, or a sequence, go? One file for each kind of router, one Protocol for all."""

from loramix.routers.base import Router, RouterConfig
from loramix.routers.sequence import SequenceRouter, SequenceRouterConfig

__all__ = ["Router", "RouterConfig", "SequenceRouter", "SequenceRouterConfig"]
