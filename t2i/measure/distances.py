"""Distances between two sets of features: Frechet (FID's formula) and kernel (KID's)."""

from dataclasses import dataclass

import cleanfid.fid
import numpy as np

from t2i.errors import DataError

MIN_IMAGES = 10_000
"""The fewest images that FID's authors recommend; the bias below: https://arxiv.org/abs/1911.07023."""

KERNEL_SUBSETS, KERNEL_SUBSET_SIZE = 100, 1_000
"""clean-fid's defaults: KID is a mean over subsets, as its cost is quadratic in their size."""


@dataclass(frozen=True)
class FrechetStatistics:
    """The Gaussian fitted to a set of features."""

    mean: np.ndarray
    """(D,) float64."""
    cov: np.ndarray
    """(D, D) float64, divided by n - 1."""
    n: int
    """Images it was fitted to."""


def statistics(features: np.ndarray) -> FrechetStatistics:
    """Fit the Gaussian of features (N, D), in float64.

    Raises:
        DataError: fewer than two rows, or a number that is not finite.
    """
    _check(features)
    # float64: the distance is a small difference of large traces.
    features = features.astype(np.float64)
    return FrechetStatistics(
        mean=features.mean(axis=0), cov=np.atleast_2d(np.cov(features, rowvar=False)), n=len(features)
    )


def frechet_distance(a: FrechetStatistics, b: FrechetStatistics) -> float:
    """Compute |mean_a - mean_b|^2 + tr(cov_a + cov_b - 2 (cov_a cov_b)^(1/2)).

    With cov_a = R R^T, the product has the eigenvalues of the symmetric R^T cov_b R, which are real and cheap.
    clean-fid's square root of the product turns complex, and fails, with many fewer images than features.

    Source: https://arxiv.org/abs/1706.08500, equation 6.

    Raises:
        DataError: the two have different widths.
    """
    if a.mean.shape != b.mean.shape:
        raise DataError(
            f"Features of width {len(a.mean)} and {len(b.mean)} cannot be compared; expected one width."
        )
    if b.n < a.n:
        a, b = b, a  # the smaller set has the lower rank: less work, and no roots of zero eigenvalues
    # Rounding gives zero eigenvalues a sign; the square root of a negative one would be NaN.
    # Sampling noise in means and covariances adds to the distance, on average by about 1 / n: it is biased upwards.
    overlap = np.sqrt(np.linalg.eigvalsh(_projected(a.cov, b.cov)).clip(min=0)).sum()
    difference = a.mean - b.mean  # (D,)
    distance = float(difference @ difference + np.trace(a.cov) + np.trace(b.cov) - 2 * overlap)
    if not np.isfinite(distance):
        raise DataError("Features are too large for a distance: their squares are no float64.")
    return max(distance, 0.0)  # rounding may leave -1e-9 for equal sets


def frechet_distances(features_a: np.ndarray, features_b: np.ndarray, *, counts: np.ndarray) -> np.ndarray:
    """Compute the Frechet distance of features (N, D) and (M, D) for R resamplings of the first set: (R,).

    Args:
        counts: (R, N) how often each row of the first set is in each resampling; N in all.
    """
    check_features(features_a, features_b)
    features = features_a.astype(np.float64)
    mean = features_b.astype(np.float64).mean(axis=0)  # (D,)
    centred = (features_b - mean) / np.sqrt(len(features_b) - 1)  # (M, D)
    # Of few images, the images themselves are a root of their covariance, and no D x D matrix is needed.
    root = centred.T if len(centred) <= centred.shape[1] else _root(centred.T @ centred)  # (D, K)
    projected = features @ root  # (N, K), once for all resamplings
    fixed = float((centred**2).sum())
    return np.array([fixed + _resampled(features, projected, count, mean=mean) for count in counts])


def _resampled(features: np.ndarray, projected: np.ndarray, count: np.ndarray, *, mean: np.ndarray) -> float:
    """Compute what of the distance depends on the resampled set."""
    kept = count > 0
    shares = count[kept] / count.sum()
    weights = count[kept] / (count.sum() - 1)
    own_mean = shares @ features[kept]  # (D,)
    trace = float(weights @ ((features[kept] - own_mean) ** 2).sum(1))
    centred = (projected[kept] - shares @ projected[kept]) * np.sqrt(weights)[:, None]  # (N, K)
    gram = centred @ centred.T if len(centred) <= centred.shape[1] else centred.T @ centred
    overlap = np.sqrt(np.linalg.eigvalsh(gram).clip(min=0)).sum()
    difference = own_mean - mean
    return float(difference @ difference + trace - 2 * overlap)


def kernel_distance(features_a: np.ndarray, features_b: np.ndarray, *, seed: int) -> float:
    """Compute KID's unbiased squared MMD, kernel (x.y / D + 1)^3, on features (N, D) and (M, D) by clean-fid.

    For equal distributions it is near zero, of either sign, at any N. A small N only makes it noisier.

    Args:
        seed: decides which subsets of at most KERNEL_SUBSET_SIZE are drawn.

    Source: https://arxiv.org/abs/1801.01401.

    Raises:
        DataError: fewer than two rows, a number that is not finite, or sets of different width.
    """
    check_features(features_a, features_b)
    whole_sets = len(features_a) == len(features_b) <= KERNEL_SUBSET_SIZE  # then every subset is the same one
    state = np.random.get_state()  # clean-fid draws from the global generator, which callers may rely on
    np.random.seed(seed)
    try:
        return cleanfid.fid.kernel_distance(
            features_a.astype(np.float64),
            features_b.astype(np.float64),
            num_subsets=1 if whole_sets else KERNEL_SUBSETS,
            max_subset_size=KERNEL_SUBSET_SIZE,
        )
    finally:
        np.random.set_state(state)


def sample_size_note(key: str, *, n: int, dims: int) -> str:
    """Warn of the bias of a Frechet distance of n images; empty for max(MIN_IMAGES, dims) images or more."""
    # With fewer images than features the covariance has no full rank, whatever the authors recommend.
    enough = max(MIN_IMAGES, dims)
    if n >= enough:
        return ""
    return (
        f"{key} with N={n:,} is biased upwards (fewer than {enough:,} images, {dims:,} features): compare"
        " only rows with the same N and the same reference."
    )


def check_features(*sets: np.ndarray) -> None:
    """Raise DataError for sets (N, D) of fewer than two rows, with numbers that are not finite, or of unequal width."""
    for features in sets:
        _check(features)
    widths = [features.shape[1] for features in sets]
    if len(set(widths)) > 1:
        found = " and ".join(map(str, widths))
        raise DataError(f"Features of width {found} cannot be compared; expected one width.")


def _check(features: np.ndarray) -> None:
    # One image has no covariance: numpy would warn, and a distance of NaN would be written into scores.json.
    if features.ndim != 2 or len(features) < 2:
        raise DataError(f"Features are of shape {features.shape}; expected (N, D) with N >= 2.")
    if not np.isfinite(features).all():
        raise DataError("Features hold NaN or infinity; expected finite numbers only.")


def _projected(cov_a: np.ndarray, cov_b: np.ndarray) -> np.ndarray:
    """Compute R^T cov_b R, where cov_a = R R^T."""
    root = _root(cov_a)
    return root.T @ cov_b @ root


def _root(cov: np.ndarray) -> np.ndarray:
    """Compute R (D, K) with cov = R R^T and a column for each non-zero eigenvalue."""
    values, vectors = np.linalg.eigh(cov)  # (D,) ascending, (D, D)
    kept = (
        values > values[-1] * len(values) * np.finfo(np.float64).eps
    )  # numpy's own rule for a matrix's rank
    return vectors[:, kept] * np.sqrt(values[kept])
