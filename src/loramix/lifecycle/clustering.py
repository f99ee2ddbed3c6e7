"""Clusters vectors: k-means on standardised directions, the number of clusters by silhouette.

Each dimension is brought to mean 0 and deviation 1, then each vector to length 1: a few dimensions of hidden states are
so much larger than the others that distances would be theirs alone. docs/discover.md shows what that makes of real
prompts.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from loramix.errors import DataError

Numbers = NDArray[Any]
_RESTARTS = 10
_COMPARED = 2000
"""Rows that silhouettes are computed on at most: they compare all pairs."""


@dataclass(frozen=True)
class Clusters:
    """Groups of vectors.

    Attributes:
        of: each row's cluster, 0 to k - 1, the largest first; int64 (N,).
        distances: of each row to its centre, (N,).
        k: how many there are.
        silhouettes: mean silhouette by number of clusters tried, from -1 to 1; with k given, of k alone.
        unfit: numbers of clusters that were tried and left a cluster with one distinct row.
        fitted: rows the clusters were fitted to.
    """

    of: Numbers
    distances: Numbers
    k: int
    silhouettes: dict[int, float]
    unfit: tuple[int, ...]
    fitted: int


def cluster(
    vectors_NH: Numbers,
    *,
    fit_rows: int | None = None,
    k: int | None = None,
    max_k: int = 12,
    max_rows: int | None = None,
    seed: int = 0,
) -> Clusters:
    """Returns the clusters of some vectors.

    Args:
        vectors_NH: float (N, H).
        fit_rows: the clusters are fitted to the first `fit_rows` rows (by default all); the others go to the nearest
            centre.
        k: how many, at least 2; None takes the number from 2 to `max_k` with the largest silhouette.
        max_k: the most that is tried.
        max_rows: rows fitted to at most, at least 4, chosen by the seed; the others go to the nearest centre.
        seed: of the choice and of k-means.

    Raises:
        DataError: there are too few distinct vectors, or k of them leave a cluster with one.
    """
    count = len(vectors_NH) if fit_rows is None else fit_rows
    chosen = list(range(count))
    if max_rows is not None and count > max_rows:
        chosen = sorted(random.Random(f"{seed} fit").sample(chosen, max_rows))
    features_NH = _directions(vectors_NH.astype(np.float64), chosen)
    fit_FH = features_NH[chosen]
    distinct = len(np.unique(fit_FH, axis=0))
    if distinct < 2 * (k or 2):
        raise DataError(
            f"{distinct} distinct prompts to cluster. Expected at least {2 * (k or 2)}, two for each cluster. Give "
            "more rows" + (", or a smaller --k." if k else ".")
        )
    tried = [k] if k else list(range(2, min(max_k, distinct // 2) + 1))
    silhouettes, unfit, centres = _tried(fit_FH, tried, seed)
    if not silhouettes:
        raise DataError(
            f"--k {k}: leaves a cluster with one distinct prompt, which cannot be both learned and measured. Give a "
            "smaller --k, or more rows."
            if k
            else "every number of clusters leaves one with a single distinct prompt. Give more rows."
        )
    best = max(silhouettes, key=lambda number: silhouettes[number])  # of equals the smallest
    nearest_N, distances_N = _nearest(features_NH, centres[best])
    sizes = np.bincount(nearest_N[:count], minlength=best)
    order = np.lexsort((np.arange(best), -sizes))
    position = np.empty(best, dtype=np.int64)
    position[order] = np.arange(best)
    return Clusters(position[nearest_N], distances_N, best, silhouettes, tuple(unfit), len(chosen))


def problems_of(k: int | None, max_k: int, max_rows: int | None) -> list[str]:
    """Returns what is wrong with the numbers that `cluster` is given."""
    problems = []
    if k is not None and k < 2:
        problems.append(f"--k {k}: expected at least 2 clusters. With one there is nothing to tell apart.")
    if max_k < 2:
        problems.append(f"--max-k {max_k}: expected at least 2 clusters.")
    if max_rows is not None and max_rows < 4:
        problems.append(f"--max-rows {max_rows}: expected at least 4 rows to fit to, two for each of two clusters.")
    return problems


def _directions(vectors_NH: Numbers, fit: list[int]) -> Numbers:
    """Returns the vectors standardised as the fitted rows are, and of length 1."""
    fitted_FH = vectors_NH[fit]
    deviation_H = fitted_FH.std(axis=0)
    deviation_H[deviation_H < 1e-6] = 1.0  # a dimension that never changes stays 0
    scaled_NH = (vectors_NH - fitted_FH.mean(axis=0)) / deviation_H
    lengths_N1 = np.linalg.norm(scaled_NH, axis=1, keepdims=True)
    return scaled_NH / np.maximum(lengths_N1, 1e-12)


def _tried(fit_FH: Numbers, tried: list[int], seed: int) -> tuple[dict[int, float], list[int], dict[int, Numbers]]:
    """Returns silhouettes by k, the ks that leave a cluster with one distinct row, and the centres by k."""
    from sklearn.cluster import KMeans
    from sklearn.metrics import silhouette_score

    silhouettes: dict[int, float] = {}
    centres: dict[int, Numbers] = {}
    unfit = []
    for k in tried:
        fitted = KMeans(n_clusters=k, n_init=_RESTARTS, random_state=seed).fit(fit_FH)
        if any(len(np.unique(fit_FH[fitted.labels_ == one], axis=0)) < 2 for one in range(k)):
            unfit.append(k)
            continue
        sample = min(len(fit_FH), _COMPARED)
        silhouette = silhouette_score(fit_FH, fitted.labels_, sample_size=sample, random_state=seed)
        silhouettes[k] = round(float(silhouette), 4)
        centres[k] = fitted.cluster_centers_
    return silhouettes, unfit, centres


def _nearest(features_NH: Numbers, centres_KH: Numbers) -> tuple[Numbers, Numbers]:
    """Returns each row's nearest centre and its distance."""
    products_NK = features_NH @ centres_KH.T
    squares_NK = (features_NH**2).sum(axis=1, keepdims=True) - 2 * products_NK + (centres_KH**2).sum(axis=1)
    nearest_N = squares_NK.argmin(axis=1)
    return nearest_N, np.sqrt(np.maximum(squares_NK.min(axis=1), 0))
