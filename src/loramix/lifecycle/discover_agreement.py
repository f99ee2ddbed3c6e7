"""How far discovered clusters agree with true labels."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Agreement:
    """Clusters beside labels.

    Attributes:
        rows: how many rows have a label; the others are not counted.
        labels: how many labels there are.
        purity: share of rows whose label is their cluster's most frequent one. It rises with the number of clusters.
        normalised_mutual_information: 0 to 1; 1 where each tells the other.
        adjusted_rand_index: 1 where they are the same partition, about 0 by chance.
        table: cluster -> label -> rows, the most frequent label first.
    """

    rows: int
    labels: int
    purity: float
    normalised_mutual_information: float
    adjusted_rand_index: float
    table: dict[str, dict[str, int]]


def agreement(clusters: Sequence[str], labels: Sequence[str | None]) -> Agreement | None:
    """Returns how clusters agree with labels, or None where no row has a label.

    Args:
        clusters: each row's cluster.
        labels: each row's true label, where it is known.
    """
    from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score

    known = [(cluster, label) for cluster, label in zip(clusters, labels, strict=True) if label is not None]
    if not known:
        return None
    found, true = [cluster for cluster, _ in known], [label for _, label in known]
    table: dict[str, dict[str, int]] = {}
    for cluster in dict.fromkeys(clusters):
        counts = Counter(label for name, label in known if name == cluster)
        table[cluster] = dict(sorted(counts.items(), key=lambda pair: (-pair[1], pair[0])))
    right = sum(max(counts.values(), default=0) for counts in table.values())
    return Agreement(
        rows=len(known),
        labels=len(set(true)),
        purity=round(right / len(known), 4),
        normalised_mutual_information=round(float(normalized_mutual_info_score(true, found)), 4),
        adjusted_rand_index=round(float(adjusted_rand_score(true, found)), 4),
        table=table,
    )
