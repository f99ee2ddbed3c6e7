"""The one number that labels and losses share."""

IGNORED = -100
"""Label of a token that is not learned; PyTorch's and transformers' convention."""
