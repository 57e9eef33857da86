import itertools
import math

import numpy as np
import pytest
from scipy import stats

from t2i.study.statistics import (
    corrected,
    difference_curve,
    ema,
    paired_test,
    rank_agreement,
    smallest_detectable,
    tokens_to_reach,
    worth_in_tokens,
)


def test_the_average_equals_the_weighted_sum_it_stands_for():
    values = np.random.default_rng(0).normal(size=30)
    for count, average in enumerate(ema(values, decay=0.8), start=1):
        weights = [0.8 ** (count - 1 - place) for place in range(count)]
        assert average == pytest.approx(np.dot(weights, values[:count]) / sum(weights))
    assert ema([3.0, 3.0, 3.0]) == pytest.approx([3.0, 3.0, 3.0])


def test_p_values_are_corrected_as_holm_does():
    # By hand: 4 x 0.01, 3 x 0.02, then 2 x 0.03 and 1 x 0.04, neither below the one before.
    assert corrected([0.03, 0.01, 0.04, 0.02]) == pytest.approx([0.06, 0.04, 0.06, 0.06])
    assert corrected([0.6, 0.9]) == [1.0, 1.0]
    found = corrected([float("nan"), 0.01])
    assert math.isnan(found[0])
    assert found[1] == pytest.approx(0.02)


def test_the_difference_and_its_interval_equal_the_formula_step_by_step():
    rng = np.random.default_rng(1)
    first, second = rng.normal(size=(4, 6)), rng.normal(size=(4, 6))
    curve = difference_curve(first, second)
    for step in range(6):
        differences = [first[seed, step] - second[seed, step] for seed in range(4)]
        mean = sum(differences) / 4
        variance = sum((one - mean) ** 2 for one in differences) / 3
        half = 3.182446305284263 * math.sqrt(variance / 4)  # Student's 97.5% quantile, 3 degrees of freedom
        assert (curve.low[step], curve.mean[step], curve.high[step]) == pytest.approx(
            (mean - half, mean, mean + half)
        )


def test_a_single_seed_has_no_interval_and_gives_no_verdict():
    curve = difference_curve(np.ones((1, 3)), np.zeros((1, 3)))
    assert curve.mean.tolist() == [1, 1, 1]
    assert np.isnan(curve.low).all()
    test = paired_test([1.0], [0.0])
    assert math.isnan(test.p_value)
    assert test.verdict == "no difference seen"


def test_the_paired_test_equals_scipys():
    rng = np.random.default_rng(2)
    first = rng.normal(size=5)
    second = first + rng.normal(0.3, 0.1, size=5)
    found, wanted = paired_test(first, second), stats.ttest_rel(first, second)
    assert found.p_value == pytest.approx(wanted.pvalue)
    interval = wanted.confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((interval.low, interval.high))
    assert found.verdict == "lower"
    assert paired_test(second, first).verdict == "higher"
    with pytest.raises(ValueError, match="expected equal ones"):
        paired_test(first, second[:4])


def test_seeds_that_agree_exactly_decide_exactly():
    assert paired_test([1.0, 2.0], [1.0, 2.0]).verdict == "no difference seen"
    assert paired_test([1.0, 2.0], [2.0, 3.0]).p_value == 0.0


@pytest.mark.parametrize("num_seeds", [2, 3, 4, 10])
def test_the_smallest_detectable_difference_is_found_four_times_in_five(num_seeds):
    rng = np.random.default_rng(3)
    size = smallest_detectable(2.0, num_seeds=num_seeds)
    draws = rng.normal(size, 2.0, size=(4_000, num_seeds))
    found = float((stats.ttest_1samp(draws, 0, axis=1).pvalue < 0.05).mean())
    # Four standard errors of a share of 0.8 over 4,000 draws are 0.025.
    assert found == pytest.approx(0.8, abs=0.025)


def test_tokens_to_reach_equals_a_walk_along_the_curve():
    tokens, losses = [100, 200, 300, 400], [5.0, 4.0, 4.5, 2.0]
    for loss in (5.0, 4.6, 4.0, 3.0, 2.0):
        walked = next(
            (
                at
                for (t0, l0), (t1, l1) in itertools.pairwise(zip(tokens, losses, strict=True))
                for at, now in ((t0 + s, l0 + (l1 - l0) * s / (t1 - t0)) for s in range(101))
                if now <= loss + 1e-9
            ),
            None,
        )
        assert tokens_to_reach(tokens, losses, loss=loss) == pytest.approx(walked, abs=1)
    assert math.isnan(tokens_to_reach(tokens, losses, loss=1.9))
    assert tokens_to_reach(tokens, losses, loss=5.5) == -math.inf


def test_a_head_start_of_a_hundred_tokens_is_worth_a_hundred():
    tokens = list(range(100, 1100, 100))
    seeds = np.array([0.0, 0.1, -0.1])[:, None]
    behind = 10 / np.arange(1, 11) + seeds
    ahead = 10 / np.arange(2, 12) + seeds
    early, last = worth_in_tokens(tokens, ahead, behind, at=[3, 9])
    assert (early.extra_tokens, early.low, early.high) == pytest.approx((100, 100, 100))
    assert early.factor == pytest.approx(500 / 400)
    assert early.loss == pytest.approx(2)
    assert (last.num_reached, math.isnan(last.extra_tokens)) == (0, True)


def test_a_loss_that_was_passed_before_the_first_measurement_is_worth_nothing_known():
    tokens = list(range(100, 1100, 100))
    ahead, behind = 10 / np.arange(2, 12)[None], 10 / np.arange(1, 11)[None]
    first, second = worth_in_tokens(tokens, behind, ahead, at=[0, 1])
    assert (first.is_earlier, first.num_reached, math.isnan(first.extra_tokens)) == (True, 1, True)
    assert (second.is_earlier, second.extra_tokens) == (False, pytest.approx(-100))


def test_orders_agree_from_one_to_minus_one():
    assert rank_agreement([1, 2, 3], [10, 20, 30]) == 1
    assert rank_agreement([1, 2, 3], [3, 2, 1]) == -1
