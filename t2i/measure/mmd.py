"""Maximum mean discrepancy: the kernels of KID and CMMD, and what a resampling of one set makes of them."""

from collections.abc import Callable

import numpy as np

from t2i.measure.distances import check_features

Kernel = Callable[[np.ndarray, np.ndarray], np.ndarray]
"""Features (N, D) and (M, D) -> (N, M)."""

CHUNK = 1_000
"""Rows of a kernel matrix that exist at one time: with 40,504 columns, 320 MB."""
CMMD_SIGMA, CMMD_SCALE = 10.0, 1_000.0
"""The paper's bandwidth, for CLIP embeddings of length 1, and its factor."""
CMMD_RULE = (
    f"{CMMD_SCALE:g} times the squared MMD, all pairs counted, kernel exp(-|x - y|^2 / (2 {CMMD_SIGMA:g}^2)), on"
    " embeddings of length 1"
)


def cubic_kernel(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Compute KID's (x.y / D + 1)^3."""
    return (x @ y.T / x.shape[1] + 1) ** 3


def rbf_kernel(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Compute CMMD's exp(-|x - y|^2 / (2 sigma^2))."""
    squared = (x**2).sum(1)[:, None] + (y**2).sum(1)[None, :] - 2 * (x @ y.T)
    return np.exp(-squared.clip(min=0) / (2 * CMMD_SIGMA**2))


def clip_distance(features_a: np.ndarray, features_b: np.ndarray) -> float:
    """Compute CMMD of CLIP embeddings (N, D) and (M, D) by CMMD_RULE.

    The mean counts each embedding with itself, as in the paper: it is biased upwards, by about the same for all models
    at equal N.

    Source: https://arxiv.org/abs/2401.09603
    """
    check_features(features_a, features_b)
    a, b = (_unit(features) for features in (features_a, features_b))
    within = sum(_sum_of_kernel(rbf_kernel, x, x) / len(x) ** 2 for x in (a, b))
    return float(CMMD_SCALE * (within - 2 * _sum_of_kernel(rbf_kernel, a, b) / (len(a) * len(b))))


def kernel_distances(features_a: np.ndarray, features_b: np.ndarray, *, counts: np.ndarray) -> np.ndarray:
    """Compute KID of whole sets, unbiased, for R resamplings of the first set: (R,).

    Args:
        counts: (R, N) how often each row of the first set is in each resampling; N in all.
    """
    check_features(features_a, features_b)
    return _resampled(cubic_kernel, features_a.astype(np.float64), features_b.astype(np.float64), counts)


def clip_distances(features_a: np.ndarray, features_b: np.ndarray, *, counts: np.ndarray) -> np.ndarray:
    """Compute CMMD, unbiased, for R resamplings of the first set: (R,); counts as in kernel_distances."""
    check_features(features_a, features_b)
    return CMMD_SCALE * _resampled(rbf_kernel, _unit(features_a), _unit(features_b), counts)


def _resampled(kernel: Kernel, a: np.ndarray, b: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Compute the squared MMD of each resampling of a: (R,)."""
    n, m = len(a), len(b)
    within, across = np.zeros(len(counts)), np.zeros(len(counts))
    for start in range(0, n, CHUNK):
        part = counts[:, start : start + CHUNK]  # (R, C)
        rows = a[start : start + CHUNK]
        own = kernel(rows, a)  # (C, N)
        # An image drawn twice is no pair of two images: counted, it would look like a model that repeats itself.
        own[np.arange(len(rows)), start + np.arange(len(rows))] = 0
        within += ((part @ own) * counts).sum(1)
        across += part @ kernel(rows, b).sum(1)
    pairs = counts.sum(1) ** 2 - (counts**2).sum(1)
    fixed = (_sum_of_kernel(kernel, b, b) - _own(kernel, b).sum()) / (m * (m - 1))
    return within / pairs + fixed - 2 * across / (n * m)


def _own(kernel: Kernel, x: np.ndarray) -> np.ndarray:
    """Compute the kernel of each row with itself: (N,)."""
    return np.array([kernel(row[None], row[None])[0, 0] for row in x])


def _sum_of_kernel(kernel: Kernel, x: np.ndarray, y: np.ndarray) -> float:
    return float(sum(kernel(x[start : start + CHUNK], y).sum() for start in range(0, len(x), CHUNK)))


def _unit(features: np.ndarray) -> np.ndarray:
    features = features.astype(np.float64)
    return features / np.linalg.norm(features, axis=1, keepdims=True).clip(min=1e-12)
