"""The key-value cache of sequences that are continued together and come and go one by one.

All rows share one axis of columns and end at its right, as left-padded prompts do, so every architecture's masks and
positions are those of `generate`. A step writes one column in place; a row that joins is copied in to end at the same
column; a row that leaves gives its place to the last one. transformers' own dynamic cache would copy all at every step.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache
from transformers.cache_utils import CacheLayerMixin, DynamicLayer

from loramix.errors import ModelError

FIRST_COLUMNS = 256


class Axis:
    """The columns that all layers' caches share, and which of them each row has.

    Attributes:
        start, end: columns in use, [start, end); every row's last token is in column end - 1.
        columns: how many there are room for.
        rows: how many rows are in use.
        mask_SC: which columns hold tokens of which row, bool (S, C) for S places.
    """

    def __init__(self, places: int, device: torch.device) -> None:
        self.columns, self.rows = FIRST_COLUMNS, 0
        self.start = self.end = FIRST_COLUMNS // 2
        self.mask_SC = torch.zeros(places, self.columns, dtype=torch.bool, device=device)

    @property
    def length(self) -> int:
        return self.end - self.start

    def mask(self) -> Tensor:
        """Returns the attention mask of the rows in use, int64 (B, columns in use)."""
        return self.mask_SC[: self.rows, self.start : self.end].long()


class _SharedColumns(CacheLayerMixin):
    """One layer's keys and values, (S, heads, columns, head size), as transformers' attention meets a cache."""

    is_sliding = False
    is_croppable = False

    def __init__(self, axis: Axis) -> None:
        super().__init__()
        self.axis = axis

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        places = len(self.axis.mask_SC)
        self.keys, self.values = (
            one.new_zeros(places, one.shape[1], self.axis.columns, one.shape[3]) for one in (key_states, value_states)
        )
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Writes the step's column and returns all columns in use, this one included, (B, heads, columns, size)."""
        axis = self.axis
        self.keys[: axis.rows, :, axis.end] = key_states[:, :, 0]
        self.values[: axis.rows, :, axis.end] = value_states[:, :, 0]
        used = slice(axis.start, axis.end + 1)
        return self.keys[: axis.rows, :, used], self.values[: axis.rows, :, used]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.axis.length + query_length, 0

    def get_seq_length(self) -> int:
        return self.axis.length

    def get_max_length(self) -> int:
        return -1


class SharedCache:
    """The caches of all layers and their axis.

    Args:
        places: rows at most.
        layers: of the model.
        device: where masks are kept.
    """

    def __init__(self, places: int, layers: int, device: torch.device) -> None:
        self.axis = Axis(places, device)
        self._layers = [_SharedColumns(self.axis) for _ in range(layers)]
        self.cache = Cache(layers=self._layers)
        self._half_moved = False

    def join(self, filled: DynamicCache, row: int, width: int) -> int:
        """Copies one row of a left-padded prompt's cache in and returns its place.

        Args:
            filled: what the prompts' forward left.
            row: which of its rows.
            width: how many of the row's last columns are tokens.

        Raises:
            ModelError: an earlier move of the columns failed; a new cache is needed.
        """
        self._refuse_half_moved()
        axis = self.axis
        if axis.rows == 0:  # nobody is left who would need the columns in use
            axis.start = axis.end = max(axis.columns // 2, min(width, axis.columns))
            axis.mask_SC.zero_()
        if width > axis.end:
            self._lay_out(before=width, after=axis.columns // 2)
        place, columns = axis.rows, slice(axis.end - width, axis.end)
        for layer, source in zip(self._layers, filled.layers, strict=True):
            if not layer.is_initialized:
                layer.lazy_initialization(source.keys, source.values)
            layer.keys[place, :, columns] = source.keys[row, :, -width:]
            layer.values[place, :, columns] = source.values[row, :, -width:]
        axis.mask_SC[place] = False
        axis.mask_SC[place, columns] = True
        axis.start = min(axis.start, axis.end - width)
        axis.rows += 1
        return place

    def leave(self, place: int, longest: int) -> None:
        """Frees a place; the row in the last place moves there.

        Args:
            place: of the row that ends.
            longest: tokens of the longest row that stays; columns before are let go.
        """
        axis = self.axis
        axis.rows -= 1
        if place != axis.rows:
            used = slice(axis.start, axis.end)
            for layer in self._layers:
                layer.keys[place, :, used] = layer.keys[axis.rows, :, used]
                layer.values[place, :, used] = layer.values[axis.rows, :, used]
            axis.mask_SC[place] = axis.mask_SC[axis.rows]
        axis.mask_SC[axis.rows] = False
        axis.start = axis.end - longest

    def begin_step(self) -> None:
        """Makes room for a column and marks it as every row's. The step's forward writes it.

        Raises:
            ModelError: an earlier move of the columns failed; a new cache is needed.
        """
        self._refuse_half_moved()
        axis = self.axis
        if axis.end == axis.columns:
            self._lay_out(before=axis.length, after=max(FIRST_COLUMNS, axis.length) // 2)
        axis.mask_SC[: axis.rows, axis.end] = True

    def mask(self) -> Tensor:
        """Returns the attention mask of a step that has begun, int64 (B, columns in use and the new one)."""
        axis = self.axis
        return axis.mask_SC[: axis.rows, axis.start : axis.end + 1].long()

    def end_step(self) -> None:
        """Counts the column the step wrote as used."""
        self.axis.end += 1

    def _lay_out(self, before: int, after: int) -> None:
        """Moves the columns in use into fresh room: so many columns up to the end, so many free behind it."""
        axis = self.axis
        old, new = slice(axis.start, axis.end), slice(before - axis.length, before)

        def moved(tensor: Tensor, dim: int) -> Tensor:
            shape = list(tensor.shape)
            shape[dim] = before + after
            fresh = tensor.new_zeros(shape)
            fresh[(slice(None),) * dim + (new,)] = tensor[(slice(None),) * dim + (old,)]
            return fresh

        # Layer by layer, as all at once would hold everything twice. Memory may run out on the way.
        self._half_moved = True
        for layer in self._layers:
            if layer.is_initialized:
                layer.keys, layer.values = moved(layer.keys, 2), moved(layer.values, 2)
        axis.mask_SC = moved(axis.mask_SC, 1)
        axis.start, axis.end, axis.columns = new.start, new.stop, before + after
        self._half_moved = False

    def _refuse_half_moved(self) -> None:
        if self._half_moved:
            raise ModelError(
                "the key-value cache was left half moved when there was no more memory for a longer one. Serve fewer "
                "answers at a time (--max-batch), or shorter ones."
            )


def attention_layers(model: Any) -> int:
    """Returns how many layers keep keys and values.

    Raises:
        ModelError: the base keeps something else too (states of linear attention), which rows cannot join or leave.
    """
    layers = DynamicCache(config=model.config).layers
    others = sorted({type(layer).__name__ for layer in layers if not isinstance(layer, DynamicLayer)})
    if others:
        raise ModelError(
            f"this base keeps {', '.join(others)} between steps, and loramix serves bases whose layers keep keys and "
            "values only. Serve it with `--engine vllm`, if vLLM knows it."
        )
    return len(layers)
