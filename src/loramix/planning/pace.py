"""How fast this machine trains, measured: true steps of the planned kind on few of the base's layers.

A step is made of what happens in layers and what does not (embedding, head, framework). Two models of few layers, and
rows of which all or next to nothing is learned, tell these apart; the rest of the layers is then reckoned with by their
FLOPs. Weights are random, and none of the base's are read.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from loramix.data.collation import Example
from loramix.data.prompts import Encoded
from loramix.errors import ConfigError
from loramix.models.larger import own_device
from loramix.planning.dry_run import DryRun
from loramix.planning.few_layers import FewLayers
from loramix.planning.timed_steps import Times, timed_steps
from loramix.planning.work import Work
from loramix.training.settings import TrainingSettings
from loramix.training.smaller_batches import bound_of

MOST_TOKENS = 1024
"""Of a measured step."""
SHORT, LONG = 4, 8
"""Layers of the two models that are measured. What fewer keep for the backward may stay in a processor's cache, which
that of a whole model does not: with 1 and 4 a layer took 15 % less time than with 4 and 8."""
TURNS = 2
"""In which both models are measured."""
LARGE = 50_000_000
"""A layer with more numbers is measured with fewer tokens, and beside one other layer only."""


@dataclass(frozen=True)
class Pace:
    """Seconds of a kind of step, by what they go by.

    Attributes:
        of_token: each token outside of layers, and in those that `flops` counts.
        flops: a token's, of the shorter model.
        of_flop: each further FLOP in layers.
        of_learned: each token that is learned: head and loss.
        of_update: each trained number, once a step.
    """

    of_token: float
    flops: float
    of_flop: float
    of_learned: float
    of_update: float

    def seconds(self, flops: float, tokens: float, learned: float, updates: float, once: float = 0.0) -> float:
        """Returns how long steps take.

        Args:
            flops: of each token, in the whole model.
            tokens, learned: of all steps; how many of them are learned.
            updates: of trained numbers, in all steps.
            once: FLOPs in layers beside them.
        """
        a_token = self.of_token + (flops - self.flops) * self.of_flop
        return tokens * a_token + learned * self.of_learned + updates * self.of_update + once * self.of_flop


def typical_rows(examples: Sequence[Example], settings: TrainingSettings, most: int = MOST_TOKENS) -> list[Example]:
    """Returns rows such as a stage learns at once: of all lengths there are, as many as a micro-batch or a part of it
    has, at most so many tokens; of a single row that is longer, its end.

    Args:
        examples: to be learned.
        settings: of the stage.
        most: tokens.
    """
    by_length = sorted(examples, key=lambda one: one.length)
    most = min(most, bound_of(settings.tokens_at_once) or most)
    mean = sum(one.length for one in by_length) / len(by_length)
    number = max(1, min(settings.per_device_train_batch_size, int(most / mean)))
    while True:
        rows = [by_length[(2 * place + 1) * len(by_length) // (2 * number)] for place in range(number)]
        if number == 1 or sum(one.length for one in rows) <= most:
            break
        number -= 1
    return rows if rows[0].length <= most or number > 1 else [_end(rows[0], most)]


def measured(
    few: FewLayers, work: Work, examples: Sequence[Example], whole: DryRun, dry: Callable[[Any], DryRun]
) -> Pace:
    """Returns the pace of a stage on this machine, as its processor would be alone with it.

    Args:
        few: makes the models.
        work: what is trained.
        examples: to be learned.
        whole: the whole model's dry run.
        dry: the same of another model.

    Raises:
        ConfigError: not even two layers fit into memory.
        Exception: whatever a base that is not like others raises.
    """
    in_one = sum(one.numel() for one in few.model(1, "meta").parameters())
    a_layer = (whole.parameters - in_one) / max(1, few.layers - 1)
    rows = typical_rows(examples, work.settings, max(1, int(MOST_TOKENS * min(1, LARGE / max(1, a_layer)))))
    barely, count = [_barely(row) for row in rows], sum(row.length for row in rows)
    sizes = _sizes(few, dry, count, large=a_layer > LARGE)
    times = _in_turn(few, list(sizes), [[barely, rows], [barely]], partial(timed_steps, work))
    one, other, short, long = times[0], times[-1], sizes[min(sizes)], sizes[max(sizes)]
    little, learned = (sum(row.supervised_tokens for row in batch) for batch in (barely, rows))
    of_learned = max(0.0, one.learning[1] - one.learning[0]) / max(1, learned - little)
    further = (long.flops_per_token - short.flops_per_token) * count
    of_flop = max(0.0, other.learning[0] - one.learning[0]) / further if further else 0.0
    of_token = max(0.0, one.learning[0] - little * of_learned) / count
    return Pace(of_token, short.flops_per_token, of_flop, of_learned, other.update / max(1, other.trained))


def _sizes(few: FewLayers, dry: Callable[[Any], DryRun], tokens: int, large: bool) -> dict[int, DryRun]:
    """Returns the layers of the two models that are measured, ascending, and their dry runs; a base of one layer is one
    model.

    Args:
        few: makes the models.
        dry: their dry run.
        tokens: of a measured step.
        large: whether layers are.

    Raises:
        ConfigError: none are small enough for the memory.
    """
    sizes = [(1, min(2, few.layers))]
    if not large:
        sizes.insert(0, (SHORT, LONG) if few.layers >= LONG else (1, few.layers))
    for both in sizes:
        runs = {layers: dry(few.model(layers, "meta")) for layers in both}
        of_steps = max(one.peak_bytes * tokens / one.tokens for one in runs.values())
        needed = of_steps + sum(one.weight_bytes + 16 * one.trained for one in runs.values())
        if needed <= (free := _free()) / 2:
            return runs
    raise ConfigError(f"a few layers take {needed / 2**20:,.0f} MiB, and {free / 2**20:,.0f} MiB are free")


def _free() -> int:
    """Returns the bytes that are free where the base would be trained."""
    if torch.cuda.is_available():
        return int(torch.cuda.mem_get_info()[0])
    import psutil  # type: ignore[import-untyped]  # accelerate's

    return int(psutil.virtual_memory().available)


def _in_turn(
    few: FewLayers, sizes: Sequence[int], batches: Sequence[Any], timed: Callable[[Any, Any], Times]
) -> list[Times]:
    """Returns the best times of models of so many layers, each with batches of its own, measured in turn, since a
    shared machine is faster at one time than at another."""
    models = [few.model(layers, own_device()) for layers in sizes]
    times: list[Times] = []
    for _ in range(TURNS):
        now = [timed(model, rows) for model, rows in zip(models, batches, strict=False)]
        times = [one.best(other) for one, other in zip(times or now, now, strict=True)]
    del models
    gc.collect()  # trainers know themselves
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return times


def _barely(row: Example) -> Example:
    """Returns a row of which only the last token is learned."""
    supervised = [False] * (row.length - 1) + [True]
    return replace(row, encoded=replace(row.encoded, supervised=supervised))


def _end(row: Example, most: int) -> Example:
    encoded, gone = row.encoded, row.length - most
    prompt = max(1, encoded.prompt_length - gone)
    left = Encoded(encoded.input_ids[gone:], encoded.supervised[gone:], prompt)
    return replace(row, encoded=left)
