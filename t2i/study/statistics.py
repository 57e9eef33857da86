"""Statistics of paired runs: differences with intervals, a test at equal tokens, the gain in tokens.

Rows are seeds, columns are steps. Arms are paired by seed, with the same data order and the same held-out samples. What
a seed does to both arms then cancels in the difference, so that two or three seeds can show something.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import optimize, stats

CONFIDENCE = 0.95
POWER = 0.8
"""The chance of finding the smallest detectable difference."""


def ema(values: Sequence[float], *, decay: float = 0.95) -> list[float]:
    """Compute exponential moving averages, corrected for the start (paper, Figure 6: 0.95)."""
    averages, average = [], 0.0
    for count, value in enumerate(values, start=1):
        average = decay * average + (1 - decay) * value
        averages.append(
            average / (1 - decay**count)
        )  # else the first steps would be pulled to the zero it begins at
    return averages


@dataclass(frozen=True)
class DifferenceCurve:
    """Mean of first - second over paired seeds, with its interval, at each step: (T,) each."""

    mean: np.ndarray
    low: np.ndarray
    high: np.ndarray
    """Bounds are nan with a single seed, which has no interval."""


def difference_curve(first: np.ndarray, second: np.ndarray) -> DifferenceCurve:
    """Compare two arms (seeds, T) step by step, with Student's interval for each step alone."""
    differences = _paired(first, second)
    mean = differences.mean(0)
    half = _half_width(differences)
    return DifferenceCurve(mean, mean - half, mean + half)


@dataclass(frozen=True)
class PairedTest:
    """A paired t-test of two arms at equal tokens."""

    num_seeds: int
    mean: float
    """Of first - second."""
    low: float
    high: float
    p_value: float
    smallest_detectable: float
    """The difference that as many seeds, as noisy as these, find with a chance of 0.8."""

    @property
    def verdict(self) -> str:
        """Describe the first arm's value: lower, higher, or no difference seen."""
        if not self.p_value < 1 - CONFIDENCE:  # not >=: nan, of a single seed, is no evidence either
            return "no difference seen"
        return "lower" if self.mean < 0 else "higher"


def paired_test(first: Sequence[float], second: Sequence[float]) -> PairedTest:
    """Test whether two arms differ at one point, given a value per seed in the same order of seeds.

    Raises:
        ValueError: the arms have different numbers of seeds, or none.
    """
    # Paired: seeds move a loss by more than most arms do, and both arms of a seed alike. Unpaired, that spread would
    # hide the difference.
    differences = _paired(np.asarray(first, dtype=float), np.asarray(second, dtype=float))
    count, mean = len(differences), float(differences.mean())
    half = float(_half_width(differences))
    return PairedTest(
        num_seeds=count,
        mean=mean,
        low=mean - half,
        high=mean + half,
        p_value=_p_value(differences),
        smallest_detectable=smallest_detectable(float(_deviation(differences)), num_seeds=count),
    )


def corrected(p_values: Sequence[float]) -> list[float]:
    """Correct p-values for their number: the chance of any false find among all is then that of one test.

    A test without a p-value (nan, for a single seed) stays nan, and counts as a test.

    Source: Holm, https://www.jstor.org/stable/4615733.
    """
    # Holm rather than Bonferroni: it holds the same error under any dependence (arms share a random start, so their
    # tests are not independent), and never finds less.
    found, largest = [float("nan")] * len(p_values), 0.0
    known = [place for place, value in enumerate(p_values) if not np.isnan(value)]
    for rank, place in enumerate(sorted(known, key=lambda place: p_values[place])):
        # A larger p-value never comes out below a smaller one, hence the running maximum.
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[place]))
        found[place] = largest
    return found


def smallest_detectable(deviation: float, *, num_seeds: int) -> float:
    """Compute the mean difference that a two-sided paired t-test finds with probability POWER; nan for one seed.

    Args:
        deviation: standard deviation of the paired differences.
    """
    if num_seeds < 2:
        return float("nan")
    freedom = num_seeds - 1
    threshold = stats.t.ppf((1 + CONFIDENCE) / 2, freedom)

    def missing_power(shift: float) -> float:
        # Of a true difference the statistic is not Student's but the non-central t: at three seeds the normal
        # approximation would promise half of what it takes. A find of the wrong sign is none, and its chance is below
        # 1e-6 here; scipy's cdf of that far tail is nan in places, so adding it would spoil the search.
        return float(stats.nct.sf(threshold, freedom, shift)) - POWER

    shift = optimize.brentq(missing_power, 0.0, 2 * threshold + 10.0)
    return float(shift) * deviation / num_seeds**0.5


@dataclass(frozen=True)
class Worth:
    """The gain of the first arm at one loss, in tokens that the second needs more, over paired seeds."""

    loss: float
    """The loss that both arms reach, the mean of the first arm's seeds."""
    first_tokens: int
    """Tokens of the first arm at that loss."""
    extra_tokens: float
    """Tokens that the second arm needs beyond these; nan if a seed does not reach the loss, or is_earlier."""
    low: float
    high: float
    factor: float
    """Tokens of the second arm over tokens of the first; nan where extra_tokens is, or where the first has none."""
    num_reached: int
    """Seeds of the second arm that reach it."""
    is_earlier: bool
    """Whether a seed of the second arm is below the loss at its first measurement, so that the tokens are not known."""


def worth_in_tokens(
    first: np.ndarray,
    second: np.ndarray,
    *,
    first_tokens: Sequence[int],
    second_tokens: Sequence[int],
    at: Sequence[int],
) -> list[Worth]:
    """Compute, at some columns, how many tokens the second arm needs to reach the first arm's loss.

    Args:
        first: (seeds, T) losses of the one arm, smoothed before if they are noisy.
        second: (seeds, T) losses of the other, likewise.
        first_tokens: (T,) tokens that the first was trained on at each column.
        second_tokens: those of the second, which are others where one of them has text beside its images.
        at: columns of the first arm to ask at.
    """
    first, second = np.atleast_2d(first), np.atleast_2d(second)
    found = []
    for column in at:
        needed = np.array(
            [
                tokens_to_reach(second_tokens, losses, loss=loss)
                for losses, loss in zip(second, first[:, column], strict=True)
            ]
        )
        # Below at its first point: it was reached before anything was measured, and no line can say when.
        is_earlier = bool(np.isneginf(needed).any())
        num_reached = int((~np.isnan(needed)).sum())
        if is_earlier:
            needed = np.full_like(needed, np.nan)
        # nan of one seed makes the mean nan: leaving that seed out would average the fast ones alone.
        extra = needed - first_tokens[column]
        half = float(_half_width(extra))
        found.append(
            Worth(
                loss=float(first[:, column].mean()),
                first_tokens=int(first_tokens[column]),
                extra_tokens=float(extra.mean()),
                low=float(extra.mean()) - half,
                high=float(extra.mean()) + half,
                # A loss that was measured before the first step took no tokens, of which nothing is a multiple.
                factor=float((needed / first_tokens[column]).mean())
                if first_tokens[column]
                else float("nan"),
                num_reached=num_reached,
                is_earlier=is_earlier,
            )
        )
    return found


def tokens_to_reach(tokens: Sequence[int], losses: Sequence[float], *, loss: float) -> float:
    """Find the tokens at which a curve first reaches a loss, with lines between its points.

    Returns:
        nan if it never does, minus infinity if its first point is below already.
    """
    below = np.flatnonzero(np.asarray(losses) <= loss)
    if not len(below):
        return float("nan")
    place = int(below[0])
    if place == 0:
        return float(tokens[0]) if losses[0] == loss else float("-inf")
    before, after = losses[place - 1], losses[place]
    share = (before - loss) / (before - after)
    return float(tokens[place - 1] + share * (tokens[place] - tokens[place - 1]))


def rank_agreement(first: Sequence[float], second: Sequence[float]) -> float:
    """Compute Kendall's tau of two orders of the same arms, such as by perplexity and by FID."""
    # Of orders, not of values: a distance and a loss have no reason to lie on a line.
    return float(stats.kendalltau(first, second).statistic)


def _paired(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    if first.shape != second.shape:
        raise ValueError(f"paired arms have shapes {first.shape} and {second.shape}; expected equal ones.")
    if not len(first):
        raise ValueError("paired arms have no seed; expected at least one.")
    return first - second


def _deviation(differences: np.ndarray) -> np.ndarray:
    if len(differences) < 2:
        return np.full(differences.shape[1:], np.nan)
    return differences.std(0, ddof=1)  # n - 1: the mean is estimated from the same few seeds


def _half_width(differences: np.ndarray) -> np.ndarray:
    """Half of Student's interval of the mean over the first axis."""
    # Student's and not the normal quantile: the deviation of few seeds is itself a guess. With three, 4.3 and not 1.96.
    count = len(differences)
    quantile = stats.t.ppf((1 + CONFIDENCE) / 2, max(1, count - 1))
    return quantile * _deviation(differences) / count**0.5


def _p_value(differences: np.ndarray) -> float:
    count = len(differences)
    if count < 2:
        return float("nan")
    deviation = float(_deviation(differences))
    if deviation == 0:  # no noise at all, such as an arm compared with itself
        return 1.0 if differences.mean() == 0 else 0.0
    statistic = abs(differences.mean()) / (deviation / count**0.5)
    return float(2 * stats.t.sf(statistic, count - 1))
