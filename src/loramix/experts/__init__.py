"""What does an expert do? Stacked LoRA experts and the equal ways of applying them."""

from loramix.experts.bank import LoraBank
from loramix.experts.linear import linear_sizes

__all__ = ["LoraBank", "linear_sizes"]
