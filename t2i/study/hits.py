"""Two ways of finding an image's caption, compared on the same images."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from scipy import stats

from t2i.study.statistics import CONFIDENCE

RESAMPLES = 4_000


@dataclass(frozen=True)
class HitComparison:
    """How much more often the second way finds the captions of N images than the first."""

    num_images: int
    ratio: float
    """Hits of the second over hits of the first; nan where the first has none."""
    low: float
    high: float
    """Bounds of a percentile bootstrap over images, which counts each as independent of the others."""
    only_second: int
    """Images that the second finds better, and the first; most images are alike in both."""
    only_first: int
    p_value: float
    """McNemar's exact test: a sign test over the images that differ."""


def compare_hits(first: Mapping[str, float], second: Mapping[str, float]) -> HitComparison | None:
    """Compare hits by key of the image, each from 0 to 1; None where they are of different images.

    Source: McNemar, https://doi.org/10.1007/BF02295996.
    """
    # Exactly the same images, not those in common: a caption is harder to find among more others.
    if not first or first.keys() != second.keys():
        return None
    one, two = (np.array([hits[key] for key in first]) for hits in (first, second))
    more, fewer = int((two > one).sum()), int((one > two).sum())
    p_value = float(stats.binomtest(more, more + fewer).pvalue) if more + fewer else 1.0
    ratio, low, high = _ratio(one, two)
    return HitComparison(len(one), ratio, low, high, more, fewer, p_value)


def _ratio(first: np.ndarray, second: np.ndarray) -> tuple[float, float, float]:
    """Divide the hits (N,) of the second by those of the first, with an interval."""
    if not first.any():
        return (float("nan"),) * 3
    count = len(first)
    # A seed, so that a report written twice says the same.
    drawn = np.random.default_rng(0).multinomial(count, np.full(count, 1 / count), size=RESAMPLES)
    with np.errstate(divide="ignore", invalid="ignore"):  # a resample without a hit of the first has no ratio
        ratios = (drawn @ second) / (drawn @ first)
    ratios = np.sort(np.where(np.isnan(ratios), np.inf, ratios))
    low, high = (
        ratios[round(share * (RESAMPLES - 1))] for share in ((1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2)
    )
    return float(second.sum() / first.sum()), float(low), float(high)
