"""The arithmetic of repeated runs, against tables, cases by hand and simulations."""

import itertools
import math

import numpy as np
import pytest

from kha_jax.analysis import rates, significance
from kha_jax.runs.results import RunResult

# Two-sided 95% and one-sided 80% points, from printed tables of Student's distribution.
TABLE = {1: (12.706, 1.376), 2: (4.303, 1.061), 3: (3.182, 0.978), 4: (2.776, 0.941)}
TABLE |= {5: (2.571, 0.920), 9: (2.262, 0.883), 30: (2.042, 0.854), 120: (1.980, 0.845)}


@pytest.mark.parametrize("freedom", TABLE)
def test_student_quantiles_are_those_of_the_tables(freedom):
    t, one_sided = TABLE[freedom]
    assert significance.student_quantile(0.975, freedom) == pytest.approx(t, abs=6e-4)
    assert significance.student_quantile(0.8, freedom) == pytest.approx(one_sided, abs=6e-4)
    assert significance.student_quantile(0.025, freedom) == pytest.approx(-t, abs=6e-4)
    assert significance.student_quantile(0.5, freedom) == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("bad", [(0, 3), (1, 3), (0.5, 0)])
def test_no_such_quantile(bad):
    with pytest.raises(ValueError, match="needs 0 < probability"):
        significance.student_quantile(*bad)


def test_a_paired_difference_by_hand():
    """Differences -1, -2, -3: mean -2, standard error 1 / sqrt(3), t_0.975 of 2 is 4.3027."""
    values, baseline = {0: 9.0, 1: 18.0, 2: 27.0, 7: 1.0}, {2: 30.0, 0: 10.0, 1: 20.0, 5: 0.0}
    found = significance.paired(values, baseline)
    assert (found.count, found.mean) == (3, -2) and found.error == pytest.approx(1 / 3**0.5)
    assert found.low == pytest.approx(-2 - 4.30265 / 3**0.5, abs=1e-4)
    assert found.high == pytest.approx(-2 + 4.30265 / 3**0.5, abs=1e-4)
    assert not found.distinguishable
    one = significance.paired({0: 1.0}, {0: 3.0})
    assert (one.count, one.mean) == (1, -2) and math.isnan(one.low) and not one.distinguishable
    assert significance.paired({0: 1.0}, {1: 3.0}).count == 0


def test_p_values_and_intervals_are_those_of_scipy():
    stats = pytest.importorskip("scipy.stats")
    random = np.random.default_rng(3)
    for count in (2, 3, 6, 11):
        a, b = random.normal(size=(2, count)) + [[0.4], [0.0]]
        found = significance.paired(dict(enumerate(a)), dict(enumerate(b)))
        expected = stats.ttest_rel(a, b)
        interval = expected.confidence_interval(0.95)
        assert found.p == pytest.approx(expected.pvalue, rel=1e-9)
        assert (found.low, found.high) == pytest.approx((interval.low, interval.high), rel=1e-9)
    assert math.isnan(significance.paired({0: 1.0}, {0: 3.0}).p)
    assert significance.paired({0: 1.0, 1: 2.0}, {0: 1.0, 1: 2.0}).p == 1.0
    assert significance.paired({0: 1.0, 1: 2.0}, {0: 2.0, 1: 3.0}).p == 0.0


def test_holm_by_hand_and_by_closed_testing():
    """A row is called different at a if every set of rows with it is, by Bonferroni's test of the
    set: the definition that Holm's steps are a shortcut of."""
    nan = math.nan
    assert significance.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert np.isnan(significance.holm([nan, 0.02, 0.5])[0])
    assert significance.holm([nan, 0.02, 0.5])[1:] == pytest.approx([0.04, 0.5])
    assert significance.holm([0.9, 0.8]) == [1.0, 1.0] and significance.holm([]) == []
    for p_values in np.random.default_rng(0).random((20, 5)) ** 3:
        sets = [s for n in range(1, 6) for s in itertools.combinations(range(5), n)]
        expected = [
            max(min(1.0, len(s) * min(p_values[i] for i in s)) for s in sets if at in s)
            for at in range(5)
        ]
        assert significance.holm(p_values) == pytest.approx(expected)


def test_bootstrap_intervals_cover_and_are_those_of_scipy():
    stats = pytest.importorskip("scipy.stats")
    values = np.random.default_rng(1).normal(size=12)

    def average(seeds):
        return float(values[seeds].mean())

    found = significance.bootstrap(range(12), average, draws=20000)
    how = {"method": "percentile", "n_resamples": 20000, "random_state": 0}
    expected = stats.bootstrap((values,), np.mean, **how).confidence_interval
    assert found == pytest.approx((expected.low, expected.high), abs=0.02)
    assert found == significance.bootstrap(range(12), average, draws=20000)
    assert all(map(math.isnan, significance.bootstrap([4], average)))


def test_sensitivity_to_the_learning_rate_by_hand():
    """Losses 3, 2, 2.04 and one that diverged and so counts as the 5 of the start: above the best
    they are 1, 0, 0.04 and 3."""
    line = {name: 0 for name in RunResult._fields}
    ends = {1e-3: 3.0, 1e-2: 2.0, 3e-2: 2.04, 1e-1: 1e9}

    def run(rate, end, seed=0, first=5.0, row="a"):
        told = {"first_loss": first, "largest_logit": 100 * rate, "spike_share": 0.002}
        return RunResult(**line | told)._replace(
            row=row, seed=seed, learning_rate=rate, val_loss=end
        )

    one = rates.over_rates([run(*of) for of in ends.items()], "val_loss")["a"]
    assert one.sensitivity == pytest.approx((1 + 0 + 0.04 + 3) / 4)
    assert (one.largest, one.diverged, one.seeds) == (3e-2, 0.25, (0,)) and math.isnan(one.low)
    at = one.rates[1e-1]
    assert (at.loss, at.diverged, at.largest_logit, at.spikes) == (5.0, 1, 10.0, 2.0)
    not_finite = [run(rate, math.nan if rate == 1e-1 else end) for rate, end in ends.items()]
    assert rates.over_rates(not_finite, "val_loss")["a"].rates == one.rates
    # a second seed that is worse by 1 all along has the same sensitivity, whoever is drawn
    more = [run(rate, end + 1, seed=1, first=6.0) for rate, end in ends.items()]
    both = rates.over_rates([*(run(*of) for of in ends.items()), *more], "val_loss")["a"]
    assert (both.sensitivity, both.low, both.high) == pytest.approx((one.sensitivity,) * 3)
    assert both.rates[1e-3].loss == 3.5 and both.seeds == (0, 1)
    # a seed that a rate lacks counts nowhere, and a row at one rate has no curve
    part = rates.over_rates([*more[:3], *map(run, ends, ends.values())], "val_loss")["a"]
    assert part.seeds == (0,) and part.sensitivity == one.sensitivity
    assert rates.over_rates([run(0.1, 2.0, row="b")], "val_loss") == {}
    older = [run(rate, end, first=None) for rate, end in ends.items()]
    assert rates.over_rates(older, "val_loss")["a"].diverged == 0


def test_deviations_are_pooled_by_their_degrees_of_freedom():
    a = significance.paired({0: 1.0, 1: 3.0}, {0: 0.0, 1: 0.0})  # variance 2, 1 degree
    b = significance.paired({0: 1.0, 1: 1.0, 2: 4.0}, dict.fromkeys(range(3), 0.0))  # 3, 2 degrees
    single = significance.paired({0: 1.0}, {0: 0.0})
    deviation, freedom = significance.pooled_deviation([a, b, single])
    assert freedom == 3 and deviation == pytest.approx(((2 + 2 * 3) / 3) ** 0.5)
    assert math.isnan(significance.pooled_deviation([single])[0])


def test_intervals_cover_and_effects_are_detected_as_often_as_they_say():
    """By simulation: 95% of intervals hold the truth, and a detectable effect is found in about 80%
    (0.77 at 3 seeds, as the docstring says)."""
    random = np.random.default_rng(0)
    effect = significance.detectable(0.5, 3)
    covered = found = 0
    for noise in random.normal(size=(1000, 3)) * 0.5:
        one = significance.paired(dict(enumerate(effect + noise)), dict.fromkeys(range(3), 0.0))
        covered += one.low <= effect <= one.high
        found += one.low > 0
    assert 930 <= covered <= 970 and 730 <= found <= 810
    needed = significance.pairs_needed(0.5, effect)
    assert needed == 3 and significance.pairs_needed(1.0, 1e-9) is None
    assert significance.detectable(1.0, 1) == math.inf


def test_rank_correlations_by_hand():
    a, b = [1.0, 2.0, 3.0, 4.0], [1.0, 3.0, 2.0, 4.0]
    assert significance.ranks([5, 1, 5, 9]).tolist() == [2.5, 1, 2.5, 4]
    assert significance.spearman(a, b) == pytest.approx(1 - 6 * 2 / (4 * 15))
    assert significance.kendall(a, b) == pytest.approx((5 - 1) / 6)
    assert significance.kendall([1, 1, 2], [1, 2, 3]) == pytest.approx(2 / (2 * 3) ** 0.5)  # a tie
    assert math.isnan(significance.spearman([1, 1, 1], [1, 2, 3]))
    assert (
        significance.spearman(a, [-z for z in a]) == significance.kendall(a, b[::-1]) - 1 / 3 == -1
    )


def test_agreement_with_a_printed_list():
    """In one order without noise; with noise the interval widens, and it is the same twice."""
    printed = [-0.03, -0.02, -0.01, 0.06]
    exact = [{seed: 2 * z for seed in range(3)} for z in printed]
    found = significance.agreement(exact, printed)
    assert (found.rows, found.same_sign, found.low, found.high) == (4, 4, 1, 1)
    assert found.spearman == pytest.approx(1) and found.chance == pytest.approx(1 / 24)
    random = np.random.default_rng(0)
    noisy = [{seed: z + 0.03 * random.normal() for seed in range(3)} for z in printed]
    found = significance.agreement(noisy, printed)
    assert found.low < found.spearman <= found.high and found.low < 1
    assert found == significance.agreement(noisy, printed)
    orders = itertools.permutations([np.mean(list(row.values())) for row in noisy])
    better = [significance.spearman(o, printed) >= found.spearman - 1e-12 for o in orders]
    assert found.chance == pytest.approx(np.mean(better))
    single = significance.agreement([{0: z} for z in printed], printed)
    assert math.isnan(single.low) and single.spearman == pytest.approx(1)
    assert significance.agreement(exact[:2], printed[:2]).same_sign == 2
    assert significance.agreement([], []).rows == 0


def test_many_rows_are_shuffled_at_random():
    printed = list(range(9))
    found = significance.agreement([{0: float(z)} for z in printed], printed, draws=200)
    assert found.chance == pytest.approx(1 / 201)
