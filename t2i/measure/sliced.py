"""Monge Inception Distance (MIND): a sliced Wasserstein distance between two sets of features.

Features are projected onto random directions. On a line, optimal transport pairs sorted values, so no covariance is
estimated, which is what makes a Frechet distance of few images biased.

Source: https://arxiv.org/abs/2605.06797
"""

from collections.abc import Iterator

import numpy as np

from t2i.measure.distances import check_features

PROJECTIONS = 1_000
PROJECTION_SEED = 0
"""Seed of the directions; part of the protocol."""
SCALE_PER_DIMENSION = 3
"""The paper scales by 3 D, so that numbers are of the size of FID's."""
CHUNK = 100
"""Directions at a time: 40,504 images on 1,000 directions would take 600 MB by the time they are sorted."""

RULE = (
    f"{SCALE_PER_DIMENSION} D times the mean over {PROJECTIONS:,} directions (numpy Generator, seed {PROJECTION_SEED})"
    " of the squared 2-Wasserstein distance"
)


def sliced_distance(features_a: np.ndarray, features_b: np.ndarray) -> float:
    """Compute MIND of features (N, D) and (M, D).

    The paper compares sets of equal size. Here the distance of unequal sets is that of their distributions: each value
    counts for 1 / N or 1 / M.

    Raises:
        DataError: fewer than two rows, a number that is not finite, or sets of different width.
    """
    everything = np.ones((1, len(features_a)), dtype=np.int64)
    return float(sliced_distances(features_a, features_b, counts=everything)[0])


def sliced_distances(features_a: np.ndarray, features_b: np.ndarray, *, counts: np.ndarray) -> np.ndarray:
    """Compute MIND of features (N, D) and (M, D) for R resamplings of the first set: (R,).

    Args:
        counts: (R, N) how often each row of the first set is in each resampling; N in all.
    """
    check_features(features_a, features_b)
    places_a, places_b, shares = _common_steps(len(features_a), len(features_b))
    sums = np.zeros(len(counts))
    for directions in directions_of(features_a.shape[1]):
        projected = (features_a.astype(np.float64) @ directions).T  # (P, N)
        order = np.argsort(projected, axis=1)
        values = np.take_along_axis(projected, order, axis=1).ravel()  # (P N,)
        other = np.sort((features_b.astype(np.float64) @ directions).T, axis=1)[:, places_b]  # (P, T)
        for place, count in enumerate(counts):
            # Sorted values repeated as often as drawn are sorted still.
            resampled = np.repeat(values, count[order].ravel()).reshape(projected.shape)[:, places_a]
            sums[place] += (((resampled - other) ** 2) @ shares).sum()
    return SCALE_PER_DIMENSION * features_a.shape[1] * sums / PROJECTIONS


def directions_of(dims: int) -> Iterator[np.ndarray]:
    """Draw all unit vectors, CHUNK at a time: (D, P)."""
    rng = np.random.default_rng(PROJECTION_SEED)
    for _ in range(PROJECTIONS // CHUNK):
        vectors = rng.standard_normal((CHUNK, dims)).T
        yield vectors / np.linalg.norm(vectors, axis=0)


def _common_steps(n: int, m: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Cut [0, 1] where the quantiles of N or of M sorted values step: places in both, and the widths (T,)."""
    # In units of 1 / (N M), which are whole numbers: in floating point, steps that fall together would not.
    edges = np.union1d(np.arange(n + 1) * m, np.arange(m + 1) * n)
    return edges[:-1] // m, edges[:-1] // n, np.diff(edges) / (n * m)
