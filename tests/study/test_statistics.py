import itertools
import math
import re
from pathlib import Path

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

REPORTS = sorted((Path(__file__).parents[2] / "docs" / "study").glob("*/report.md"))


def student_cdf(at, freedom):
    """Integrate Student's density by Simpson's rule from 0, where the distribution is a half."""
    x = np.linspace(0, at, 20_001)
    norm = math.gamma((freedom + 1) / 2) / math.sqrt(freedom * math.pi) / math.gamma(freedom / 2)
    density = norm * (1 + x**2 / freedom) ** (-(freedom + 1) / 2)
    weights = np.r_[1, np.tile([4, 2], 9_999), 4, 1]
    return 0.5 + float(density @ weights) * at / 20_000 / 3


def student_quantile(freedom):
    """Bisect for the 97.5% quantile."""
    low, high = 0.0, 20.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (low, middle) if student_cdf(middle, freedom) > 0.975 else (middle, high)
    return low


def power(shift, count):
    """Integrate the chance of a find over all deviations that `count` draws can have, with no non-central t."""
    freedom = count - 1
    x = np.linspace(
        0, 15, 60_001
    )  # of chi with at most 9 degrees of freedom, whose tail there is below 1e-40
    chi = x ** (freedom - 1) * np.exp(-(x**2) / 2) / 2 ** (freedom / 2 - 1) / math.gamma(freedom / 2)
    above = np.array(
        [math.erfc(one / math.sqrt(2)) / 2 for one in student_quantile(freedom) * x / freedom**0.5 - shift]
    )
    weights = np.r_[1, np.tile([4, 2], 29_999), 4, 1]
    return float((chi * above) @ weights) * 15 / 60_000 / 3


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


@pytest.mark.parametrize("count", range(2, 11))
def test_intervals_and_p_values_of_few_seeds_are_those_of_students_integral(count):
    rng = np.random.default_rng(count)
    first, second = rng.normal(size=(2, count))
    found = paired_test(first, second)
    differences = [a - b for a, b in zip(first, second, strict=True)]
    mean = sum(differences) / count
    error = math.sqrt(sum((one - mean) ** 2 for one in differences) / (count - 1) / count)
    half = student_quantile(count - 1) * error
    assert (found.low, found.mean, found.high) == pytest.approx((mean - half, mean, mean + half), abs=1e-8)
    assert found.p_value == pytest.approx(2 - 2 * student_cdf(abs(mean) / error, count - 1), abs=1e-8)


def test_arms_without_a_seed_are_refused():
    for compare in (paired_test, lambda a, b: difference_curve(np.ones((0, 3)), np.ones((0, 3)))):
        with pytest.raises(ValueError, match="have no seed; expected at least one"):
            compare([], [])


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


@pytest.mark.parametrize("count", range(2, 11))
def test_the_smallest_detectable_difference_has_the_power_that_it_is_said_to_have(count):
    shift = smallest_detectable(3.0, num_seeds=count) / 3 * math.sqrt(count)
    # The search ends within 2e-12 of the shift, and the quantile above within 1e-9.
    assert power(shift, count) == pytest.approx(0.8, abs=1e-7)


def test_the_smallest_detectable_difference_of_few_seeds_is_what_was_published_elsewhere():
    assert smallest_detectable(1.0, num_seeds=2) == pytest.approx(11.5499, abs=5e-5)
    assert smallest_detectable(1.0, num_seeds=3) == pytest.approx(3.2640, abs=5e-5)
    assert smallest_detectable(0.0, num_seeds=3) == 0
    assert all(math.isnan(smallest_detectable(1.0, num_seeds=count)) for count in (0, 1))
    assert math.isnan(paired_test([1.0], [0.0]).smallest_detectable)


@pytest.mark.parametrize("report", REPORTS, ids=lambda file: file.parent.name)
def test_the_published_reports_say_what_their_intervals_follow_to(report):
    def detectable(low, high, count):
        half = (float(high) - float(low)) / 2
        return (
            half / student_quantile(count - 1) * smallest_detectable(1.0, num_seeds=count) * math.sqrt(count)
        )

    text = report.read_text()
    interval, rounded = r"\(95%: ([+-][\d.]+) to ([+-][\d.]+)\)", 5e-4  # of two bounds with four decimals
    sentence = rf"{interval}, paired t-test over (\d+) seeds: .*?(?:difference of|power is) ([\d.]+) nats"
    found = re.findall(sentence, text)
    for low, high, count, said in found:
        assert float(said) == pytest.approx(detectable(low, high, int(count)), abs=rounded)
    # Other tables end in the number of seeds. This one does not say it; the studies have two, three or five.
    for table in re.findall(r"\| detectable, 80% power \| *\n((?:\|.*\n)+)", text):
        rows = re.findall(rf"{interval} \| [\d.e-]+ \| [\d.e-]+ \| ([\d.]+) \|", table)
        assert len(rows) == table.count("95%")
        for low, high, said in rows:
            assert any(float(said) == pytest.approx(detectable(low, high, n), abs=rounded) for n in (2, 3, 5))
    assert len(found) == text.count("paired t-test over")


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


def worth(tokens, first, second, *, at):
    return worth_in_tokens(first, second, first_tokens=tokens, second_tokens=tokens, at=at)


def test_each_arms_own_tokens_are_counted():
    """The second has read half as many again at each step, so it needs as many more for the same loss."""
    losses = np.array([[4.0, 2.0, 1.0]])
    found = worth_in_tokens(
        losses, losses, first_tokens=[100, 200, 300], second_tokens=[150, 300, 450], at=[1]
    )
    assert (found[0].first_tokens, found[0].extra_tokens, found[0].factor) == (200, 100, 1.5)


def test_a_head_start_of_a_hundred_tokens_is_worth_a_hundred():
    tokens = list(range(100, 1100, 100))
    seeds = np.array([0.0, 0.1, -0.1])[:, None]
    behind = 10 / np.arange(1, 11) + seeds
    ahead = 10 / np.arange(2, 12) + seeds
    early, last = worth(tokens, ahead, behind, at=[3, 9])
    assert (early.extra_tokens, early.low, early.high) == pytest.approx((100, 100, 100))
    assert early.factor == pytest.approx(500 / 400)
    assert early.loss == pytest.approx(2)
    assert (last.num_reached, math.isnan(last.extra_tokens)) == (0, True)


def test_a_loss_that_was_passed_before_the_first_measurement_is_worth_nothing_known():
    tokens = list(range(100, 1100, 100))
    ahead, behind = 10 / np.arange(2, 12)[None], 10 / np.arange(1, 11)[None]
    first, second = worth(tokens, behind, ahead, at=[0, 1])
    assert (first.is_earlier, first.num_reached, math.isnan(first.extra_tokens)) == (True, 1, True)
    assert (second.is_earlier, second.extra_tokens) == (False, pytest.approx(-100))


def test_what_was_measured_before_the_first_step_has_no_multiple():
    ahead, behind = np.array([[3.0, 2.0, 1.0]]), np.array([[4.0, 2.5, 2.0]])
    start, middle, _ = worth([0, 100, 200], ahead, behind, at=[0, 1, 2])
    assert (start.first_tokens, start.extra_tokens) == (0, pytest.approx(200 / 3))
    assert math.isnan(start.factor)
    assert (middle.extra_tokens, middle.factor) == (100, 2)


def test_orders_agree_from_one_to_minus_one():
    assert rank_agreement([1, 2, 3], [10, 20, 30]) == 1
    assert rank_agreement([1, 2, 3], [3, 2, 1]) == -1
