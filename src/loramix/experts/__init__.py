"""What does an expert do? Stacked LoRA experts and the equal ways of applying them."""

from loramix.experts.allocation import allocation_problem, experts_per_layer, extremes
from loramix.experts.bank import LoraBank, one_expert
from loramix.experts.config import BankConfig
from loramix.experts.linear import linear_sizes
from loramix.experts.parts import outputs_of
from loramix.experts.prototypes import prototypes

__all__ = [
    "BankConfig",
    "LoraBank",
    "allocation_problem",
    "experts_per_layer",
    "extremes",
    "linear_sizes",
    "one_expert",
    "outputs_of",
    "prototypes",
]
