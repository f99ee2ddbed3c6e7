"""The one visible table of metrics: every one gives a vector of statistics per example, and values a sum of vectors.

So a table needs no model, and one bootstrap serves all metrics: it resamples examples, adds up, and takes the value.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from sacrebleu.metrics import BLEU

from loramix.evaluation.scoring import Score

Stats = list[list[float]]
"""One vector for each example, (N, S)."""


@dataclass(frozen=True)
class Metric:
    """How a metric is called and valued.

    Attributes:
        title: for tables.
        better: which way is better.
        digits: decimals shown.
        value: of the sum of the examples' statistics, (S,).
    """

    title: str
    better: Literal["lower", "higher"]
    digits: int
    value: Callable[[Sequence[float]], float]


@dataclass(frozen=True)
class Measured:
    """One metric on the examples of one domain.

    Attributes:
        metric: a name in METRICS.
        signature: all choices that change the number, in one line.
        stats: one vector for each example.
    """

    metric: str
    signature: str
    stats: Stats


def _perplexity(sums: Sequence[float]) -> float:
    nll, tokens = sums
    return math.exp(min(nll / max(tokens, 1), 700.0))


def _percent(sums: Sequence[float]) -> float:
    right, of = sums
    return 100 * right / max(of, 1)


def _bleu(sums: Sequence[float]) -> float:
    counts, totals, lengths = sums[:4], sums[4:8], sums[8:]
    return float(
        BLEU.compute_bleu(
            correct=[round(n) for n in counts],
            total=[round(n) for n in totals],
            sys_len=round(lengths[0]),
            ref_len=round(lengths[1]),
            smooth_method="exp",  # what BLEU() itself uses for a corpus
        ).score
    )


METRICS: dict[str, Metric] = {
    "perplexity": Metric("Perplexity", "lower", 3, _perplexity),
    "bleu": Metric("BLEU", "higher", 1, _bleu),
    "rouge_l": Metric("ROUGE-L", "higher", 1, _percent),
    "glm_bleu_4": Metric("BLEU-4 by characters (GLM recipe)", "higher", 1, _percent),
    "glm_rouge_l": Metric("ROUGE-L by jieba (GLM recipe)", "higher", 1, _percent),
    "choice": Metric("Accuracy, by letter", "higher", 1, _percent),
    "choice_generated": Metric("Accuracy, generated", "higher", 1, _percent),
    "exact_number": Metric("Right number", "higher", 1, _percent),
    "judge": Metric("Judge, 0-100", "higher", 1, _percent),
}


def summed(stats: Stats) -> list[float]:
    """Returns the sum of the examples' vectors."""
    return [math.fsum(column) for column in zip(*stats, strict=True)]


def value_of(metric: str, stats: Stats) -> float:
    """Returns the value of a metric on all examples together."""
    return METRICS[metric].value(summed(stats))


def perplexity_measured(scores: Sequence[Score], tokenizer: str) -> Measured:
    """Returns the perplexity of some examples.

    Args:
        scores: of the examples.
        tokenizer: name of the base whose tokens are counted.
    """
    signature = f"exp(nll/tokens)|tokens:response|tokenizer:{tokenizer}"
    return Measured("perplexity", signature, [[score.nll, float(score.tokens)] for score in scores])
