"""Pure functions of tensors and Routings; none knows a module."""

from loramix.losses.contrastive import contrastive
from loramix.losses.head_nll import head_nll
from loramix.losses.language import next_token_nll, supervised_positions, supervised_tokens
from loramix.losses.load_balance import gate_balance, load_balance, router_z
from loramix.losses.localized_balance import localized_balance, localized_balance_cv
from loramix.losses.routing_cross_entropy import layer_correct, routing_cross_entropy
from loramix.losses.table import AUXILIARY, Auxiliary, Seen

__all__ = [
    "AUXILIARY",
    "Auxiliary",
    "Seen",
    "contrastive",
    "gate_balance",
    "head_nll",
    "layer_correct",
    "load_balance",
    "localized_balance",
    "localized_balance_cv",
    "next_token_nll",
    "router_z",
    "routing_cross_entropy",
    "supervised_positions",
    "supervised_tokens",
]
