"""How many bytes of tensors are alive, operation by operation; on the meta device too, where none has any numbers."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from functools import partial
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Alive(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Adds up the storages of tensors that operations inside make, each from the operation that makes it until nothing
    refers to it any more. What a kernel holds for itself while it runs is not seen.

    Args:
        there: tensors that were there before and do not count.

    Attributes:
        bytes: alive now.
        peak: the most there have been.
    """

    def __init__(self, there: Iterable[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.bytes = self.peak = 0
        self._there = [tensor.untyped_storage() for tensor in there]  # held, so that no other gets a place of theirs
        self._uncounted = {storage._cdata for storage in self._there}
        self._counted: dict[int, Any] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor):
                self._see(tensor)
        return made

    def _see(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        place, size = storage._cdata, storage.nbytes()
        if place in self._counted or place in self._uncounted:
            return
        self._counted[place] = weakref.ref(storage, partial(self._gone, place, size))
        self.bytes += size
        self.peak = max(self.peak, self.bytes)

    def _gone(self, place: int, size: int, _: Any) -> None:
        del self._counted[place]
        self.bytes -= size
