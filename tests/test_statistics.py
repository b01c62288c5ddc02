"""The arithmetic of repeated runs, against tables, cases by hand and simulations."""

import itertools
import math

import numpy as np
import pytest

from kha_jax.analysis import significance

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
