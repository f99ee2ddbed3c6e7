"""The frozen base: finding and loading it, and which of its modules are adapted."""

from loramix.models.base import layers_of, load_base, load_skeleton, load_tokenizer
from loramix.models.builtin import NAME as BUILTIN

__all__ = ["BUILTIN", "layers_of", "load_base", "load_skeleton", "load_tokenizer"]
