"""Papers as lists of choices. A new paper is one file here and one row in `table.py`."""

from loramix.methods.base import FewShotSearch, Method, Stage
from loramix.methods.table import METHODS, method_named

__all__ = ["METHODS", "FewShotSearch", "Method", "Stage", "method_named"]
