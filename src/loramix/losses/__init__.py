"""Pure functions of tensors and Routings; none knows a module."""

from loramix.losses.language import next_token_nll, supervised_positions
from loramix.losses.routing_cross_entropy import layer_correct, routing_cross_entropy

__all__ = ["layer_correct", "next_token_nll", "routing_cross_entropy", "supervised_positions"]
