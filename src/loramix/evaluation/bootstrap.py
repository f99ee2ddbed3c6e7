"""Intervals and paired tests by the bootstrap: examples are drawn anew, their statistics added up, the sum valued.

All models of a comparison are measured on the same examples, so all see the same draws: a difference is taken within
each draw (paired bootstrap; Efron and Tibshirani 1993, chapter 16; Koehn 2004 for translation metrics).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Value = Callable[[Sequence[float]], float]
Array = NDArray[np.float64]


@dataclass(frozen=True)
class Interval:
    """The 95 % percentile interval of a bootstrap."""

    low: float
    high: float


@dataclass(frozen=True)
class Difference:
    """How much larger the first value is, its interval, and how likely a difference at least as far from zero would be
    if there were none (two-sided; never below 2 / (draws + 1))."""

    difference: float
    low: float
    high: float
    p: float


class Draws:
    """Draws of examples with replacement, by domain: the same for every model and metric.

    Args:
        resamples: how many.
        seed: of the draws.
    """

    def __init__(self, resamples: int, seed: int = 0) -> None:
        self.resamples, self.seed = resamples, seed
        self._counts: dict[tuple[str, int], Array] = {}

    def counts(self, domain: str, examples: int) -> Array:
        """Returns how often each example occurs in each draw, (R, N)."""
        key = (domain, examples)
        if key not in self._counts:
            entropy = [self.seed, examples, *domain.encode()]
            generator = np.random.default_rng(entropy)
            drawn = generator.multinomial(examples, np.full(examples, 1 / examples), size=self.resamples)
            self._counts[key] = drawn.astype(np.float64)
        return self._counts[key]

    def values(self, domain: str, stats_by_seed: Sequence[Sequence[Sequence[float]]], value: Value) -> Array:
        """Returns the value in each draw, (R,): the mean over training seeds, which share their draws.

        Args:
            domain: whose examples they are.
            stats_by_seed: for each training seed one vector per example, (N, S).
            value: of a sum of vectors.
        """
        by_seed = []
        for stats in stats_by_seed:
            stats_NS = np.asarray(stats, dtype=np.float64)
            sums_RS = self.counts(domain, len(stats_NS)) @ stats_NS
            by_seed.append([value(row) for row in sums_RS.tolist()])
        values: Array = np.mean(np.asarray(by_seed), axis=0)
        return values


def interval(values_R: Array) -> Interval:
    """Returns the 95 % interval of the values in all draws."""
    low, high = np.percentile(values_R, [2.5, 97.5])
    return Interval(float(low), float(high))


def difference(observed: float, first_R: Array, second_R: Array) -> Difference:
    """Returns the paired difference of two models.

    Args:
        observed: first minus second on the examples as they are.
        first_R, second_R: values in the same draws.
    """
    apart_R = first_R - second_R
    draws = len(apart_R)
    below, above = int((apart_R <= 0).sum()), int((apart_R >= 0).sum())
    p = min(1.0, 2 * (1 + min(below, above)) / (draws + 1))
    low, high = np.percentile(apart_R, [2.5, 97.5])
    return Difference(observed, float(low), float(high), p)


def mean_over_domains(values: Mapping[str, Array]) -> Array:
    """Returns the unweighted mean over domains in each draw, (R,); examples are drawn within their domain."""
    mean: Array = np.mean(np.stack(list(values.values())), axis=0)
    return mean
