"""Intervals and paired tests against theory: coverage, the standard error of a mean, p under no difference, and
sacrebleu's own paired bootstrap."""

from __future__ import annotations

import numpy as np
import pytest
from sacrebleu.metrics import BLEU
from sacrebleu.significance import PairedTest
from scipy import stats as theory

from loramix.evaluation.bootstrap import Draws, difference, interval, mean_over_domains
from loramix.evaluation.metrics import METRICS, value_of
from loramix.evaluation.text_overlap import text_metric


def _mean(sums) -> float:
    return sums[0] / sums[1]


def _ones(values) -> list[list[float]]:
    return [[float(value), 1.0] for value in values]


def test_draws_depend_on_seed_and_domain_and_nothing_else():
    counts = Draws(50, seed=3).counts("law", 20)
    assert counts.shape == (50, 20)
    assert (counts.sum(axis=1) == 20).all()
    later = Draws(50, seed=3)
    later.counts("medicine", 20)
    assert (later.counts("law", 20) == counts).all()
    assert (later.counts("medicine", 20) != counts).any()
    assert (Draws(50, seed=4).counts("law", 20) != counts).any()


def test_spread_of_a_mean_is_its_standard_error():
    sample = np.random.default_rng(0).normal(5, 2, size=80)
    values = Draws(20_000).values("d", [_ones(sample)], _mean)
    assert values.mean() == pytest.approx(sample.mean(), abs=0.01)
    assert values.std() == pytest.approx(sample.std() / np.sqrt(80), rel=0.02)
    found = interval(values)
    # Of a mean of 80 the percentile interval is nearly the normal one, with the sample's own (1/N) deviation.
    half = 1.96 * sample.std() / np.sqrt(80)
    assert (found.low, found.high) == pytest.approx((sample.mean() - half, sample.mean() + half), abs=0.03)


def test_the_interval_covers_the_truth_as_often_as_it_says():
    random = np.random.default_rng(1)
    draws = Draws(400)
    covered = 0
    for _ in range(400):
        found = interval(draws.values("d", [_ones(random.normal(0, 1, size=60))], _mean))
        covered += found.low <= 0 <= found.high
    # 0.95 less a little for the percentile method at N = 60; four standard errors of 400 trials are 0.044.
    assert 0.90 <= covered / 400 <= 0.985


def test_a_ratio_of_sums_weighs_long_examples_more():
    stats = [[10.0, 1.0], [1.0, 9.0]]
    values = Draws(2000).values("d", [stats], METRICS["perplexity"].value)
    both, first, second = np.exp(11 / 10), np.exp(10.0), np.exp(1 / 9)
    for wanted, share in ((both, 0.5), (first, 0.25), (second, 0.25)):
        assert np.isclose(values, wanted).mean() == pytest.approx(share, abs=0.05)


def test_training_seeds_share_their_draws():
    random = np.random.default_rng(2)
    first, second = _ones(random.normal(size=30)), _ones(random.normal(size=30))
    draws = Draws(100)
    alone = [draws.values("d", [one], _mean) for one in (first, second)]
    assert draws.values("d", [first, second], _mean) == pytest.approx(np.mean(alone, axis=0))


def test_average_over_domains_weighs_domains_alike_and_draws_within_each():
    random = np.random.default_rng(3)
    large, small = random.normal(0, 1, size=400), random.normal(10, 3, size=25)
    draws = Draws(10_000)
    by_domain = {name: draws.values(name, [_ones(part)], _mean) for name, part in {"l": large, "s": small}.items()}
    mean = mean_over_domains(by_domain)
    assert mean.mean() == pytest.approx((large.mean() + small.mean()) / 2, abs=0.02)
    error = np.sqrt(large.var() / 400 + small.var() / 25) / 2
    assert mean.std() == pytest.approx(error, rel=0.03)


def test_without_a_difference_p_is_uniform():
    random = np.random.default_rng(4)
    draws = Draws(400)
    ps = []
    for _ in range(400):
        common = random.normal(0, 3, size=80)  # examples are hard or easy for both
        first, second = common + random.normal(size=80), common + random.normal(size=80)
        values = [draws.values("d", [_ones(one)], _mean) for one in (first, second)]
        ps.append(difference(first.mean() - second.mean(), *values).p)
    assert theory.kstest(ps, "uniform").pvalue > 0.01
    assert np.mean(np.asarray(ps) < 0.05) == pytest.approx(0.05, abs=0.035)


def test_p_agrees_with_the_paired_t_test():
    random = np.random.default_rng(5)
    common = random.normal(0, 3, size=200)
    first, second = common + random.normal(0.19, 1, size=200), common + random.normal(size=200)
    draws = Draws(20_000)
    values = [draws.values("d", [_ones(one)], _mean) for one in (first, second)]
    found = difference(first.mean() - second.mean(), *values)
    wanted = theory.ttest_rel(first, second)
    assert 0.005 < wanted.pvalue < 0.2
    assert found.p == pytest.approx(wanted.pvalue, rel=0.15)
    span = wanted.confidence_interval()
    assert (found.low, found.high) == pytest.approx((span.low, span.high), abs=0.02)
    # Unpaired, the examples' own difficulty hides it.
    assert theory.ttest_ind(first, second).pvalue > 3 * found.p


def test_identical_systems_do_not_differ():
    values = Draws(100).values("d", [_ones(range(10))], _mean)
    found = difference(0.0, values, values)
    assert (found.difference, found.low, found.high, found.p) == (0.0, 0.0, 0.0, 1.0)


def test_the_sign_and_the_least_p():
    draws = Draws(99)
    low, high = (draws.values("d", [_ones([shift, shift + 1])], _mean) for shift in (0, 5))
    better, worse = difference(5.0, high, low), difference(-5.0, low, high)
    assert better.low == better.high == -worse.low == 5
    assert 0 < better.p == worse.p <= 2 / 100


def _sentences(seed: int, right: float, count: int = 120) -> tuple[list[str], list[str]]:
    """Returns answers of which a share of the words is right, and their references."""
    random = np.random.default_rng(seed)
    words = [f"word{i}" for i in range(200)]
    references = [" ".join(np.random.default_rng(i).choice(words, size=12)) for i in range(count)]
    answers = [
        " ".join(word if random.random() < right else str(random.choice(words)) for word in reference.split())
        for reference in references
    ]
    return answers, references


@pytest.mark.parametrize(("right", "clear"), [(0.70, False), (0.755, True)])
def test_bleu_agrees_with_sacrebleus_paired_bootstrap(monkeypatch, right, clear):
    monkeypatch.setenv("SACREBLEU_SEED", "1")
    (first, references), (second, _) = _sentences(1, 0.70), _sentences(2, right)
    _, theirs = PairedTest(
        [("first", first), ("second", second)], {"BLEU": BLEU()}, [references], test_type="bs", n_samples=1000
    )()
    draws = Draws(1000)
    measured = [text_metric("bleu", answers, references, "en") for answers in (first, second)]
    values = [draws.values("d", [one.stats], METRICS["bleu"].value) for one in measured]
    observed = [value_of("bleu", one.stats) for one in measured]
    for score, ours, drawn in zip(theirs["BLEU"], observed, values, strict=True):
        assert ours == pytest.approx(score.score)
        found = interval(drawn)
        # Both estimate the same interval from 1000 draws of their own; theirs is centred on the draws' mean.
        assert (found.low + found.high) / 2 == pytest.approx(score.mean, abs=0.5)
        assert (found.high - found.low) / 2 == pytest.approx(score.ci, rel=0.1)
    # sacrebleu counts draws whose absolute difference lies further above the mean absolute difference than the observed
    # one above zero. That rule on our draws gives its p, within the noise of 1000 draws each.
    apart = np.abs(values[1] - values[0])
    by_their_rule = ((apart - apart.mean() > abs(observed[1] - observed[0])).sum() + 1) / 1001
    wanted = theirs["BLEU"][1].p_value
    assert by_their_rule == pytest.approx(wanted, abs=0.03)
    p = difference(observed[1] - observed[0], values[1], values[0]).p
    assert (p < 0.05) == (wanted < 0.05) == clear
    if clear:  # then its rule counts one tail only; near zero it is no tail probability at all, and there is no factor
        assert p / 2 == pytest.approx(wanted, abs=0.01)
