"""Every distance of one set of features to a reference, with the interval that holds the mean over such drawings."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from t2i.measure import mmd, sliced
from t2i.measure.distances import (
    KERNEL_SUBSET_SIZE,
    KERNEL_SUBSETS,
    frechet_distance,
    frechet_distances,
    kernel_distance,
)
from t2i.measure.extractor import kernel_key, metric_key, sliced_key
from t2i.measure.feature_cache import Measured

KERNEL_SEED = 0
"""Seed of the subsets that a kernel distance is averaged over; part of the protocol."""
BOOTSTRAP_SEED = 0
REPLICATES = 100
"""Resamplings per interval: the standard deviation of so many is known to 7%."""
BOOTSTRAP_MOST = 5_000
"""Images up to which intervals are made without being asked for; 30,000 take minutes per row."""
LEAST_RESAMPLED = 10
"""Images that an interval needs. Of three, each ninth resampling is one image alone, which has no kernel distance."""
NORMAL_95 = 1.96
CMMD = "cmmd"


@dataclass(frozen=True)
class Distance:
    """One measure: how it is computed, and how for resamplings of the first set."""

    rule: str
    """In words; part of the protocol."""
    value: Callable[[Measured, Measured], float]
    resampled: Callable[[Measured, Measured, np.ndarray], np.ndarray]
    """For counts (R, N): (R,)."""


@dataclass(frozen=True)
class Estimate:
    """A distance, and its interval."""

    value: float
    interval: tuple[float, float] | None
    """95%, if the reference stays and the images are drawn again; None if it was not asked for, or of few images."""


def distances_on(features: str) -> dict[str, Distance]:
    """List the measures that are taken on features of this name, by their keys in scores.json."""
    found = {
        metric_key(features): Distance(
            "Frechet distance of Gaussians, covariances over n - 1",
            lambda made, reference: frechet_distance(made.statistics, reference.statistics),
            lambda made, reference, counts: frechet_distances(
                made.features, reference.features, counts=counts
            ),
        ),
        kernel_key(features): Distance(
            f"squared MMD, unbiased, kernel (x.y / D + 1)^3, mean of {KERNEL_SUBSETS} subsets of at most"
            f" {KERNEL_SUBSET_SIZE:,}",
            lambda made, reference: kernel_distance(made.features, reference.features, seed=KERNEL_SEED),
            lambda made, reference, counts: mmd.kernel_distances(
                made.features, reference.features, counts=counts
            ),
        ),
        sliced_key(features): Distance(
            sliced.RULE,
            lambda made, reference: sliced.sliced_distance(made.features, reference.features),
            lambda made, reference, counts: sliced.sliced_distances(
                made.features, reference.features, counts=counts
            ),
        ),
    }
    if features == "clip":
        found[CMMD] = Distance(
            mmd.CMMD_RULE,
            lambda made, reference: mmd.clip_distance(made.features, reference.features),
            lambda made, reference, counts: mmd.clip_distances(
                made.features, reference.features, counts=counts
            ),
        )
    return found


def replicates_for(asked: int | None, *, n: int) -> int:
    """Choose how many resamplings an interval is made of; 0 for no interval."""
    if asked is not None:
        return asked
    return REPLICATES if n <= BOOTSTRAP_MOST else 0


def measure(made: Measured, reference: Measured, *, features: str, replicates: int) -> dict[str, Estimate]:
    """Measure all distances of `made` to the reference, each with an interval if replicates >= 2 and there are enough.

    The reference is part of the protocol, so it stays as it is: only the images of `made` are resampled.
    """
    counts = bootstrap_counts(len(made.features), replicates=replicates)
    found = {}
    for key, distance in distances_on(features).items():
        value = distance.value(made, reference)
        interval = None
        if replicates >= 2 and len(made.features) >= LEAST_RESAMPLED:
            interval = interval_of(value, distance.resampled(made, reference, counts))
        found[key] = Estimate(value, interval)
    return found


def bootstrap_counts(n: int, *, replicates: int) -> np.ndarray:
    """Draw n of n images with replacement, again and again: how often each was drawn (R, N)."""
    rng = np.random.default_rng(BOOTSTRAP_SEED)
    return rng.multinomial(n, np.full(n, 1 / n), size=replicates)


def interval_of(value: float, resampled: np.ndarray) -> tuple[float, float]:
    """Put the spread of resamplings around a value: 95%, by the normal distribution.

    Around the value and not around their own mean: an image drawn twice makes a set look narrower, so that resamplings
    lie too far from the reference on average.
    """
    reach = NORMAL_95 * float(resampled.std(ddof=1))
    return value - reach, value + reach
