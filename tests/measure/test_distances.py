import inspect

import cleanfid.fid
import numpy as np
import pytest
import scipy.linalg

from t2i.measure.distances import (
    FrechetStatistics,
    frechet_distance,
    kernel_distance,
    sample_size_note,
    statistics,
)


def gaussian_features(*, n: int, dims: int, seed: int, shift: float = 0.0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    mixing = np.random.default_rng(99).normal(size=(dims, dims))
    return (rng.normal(size=(n, dims)) @ mixing + shift).astype(np.float32)


def test_frechet_distance_has_its_closed_form_for_diagonal_gaussians():
    rng = np.random.default_rng(0)
    mean_a, mean_b = rng.normal(size=(2, 40))
    std_a, std_b = rng.uniform(0.1, 3, size=(2, 40))
    a = FrechetStatistics(mean=mean_a, cov=np.diag(std_a**2), n=100)
    b = FrechetStatistics(mean=mean_b, cov=np.diag(std_b**2), n=100)
    wanted = ((mean_a - mean_b) ** 2).sum() + ((std_a - std_b) ** 2).sum()
    # float64 eigenvalues of 40 x 40: about 1e-14 is seen
    assert frechet_distance(a, b) == pytest.approx(wanted, rel=1e-10)


# With fewer pictures than features the product is singular, and clean-fid's root of it as rough as eps^(1/2).
@pytest.mark.parametrize(("n", "dims", "rel"), [(500, 48, 1e-9), (60, 96, 1e-6)])
@pytest.mark.skipif(
    "disp" not in inspect.signature(scipy.linalg.sqrtm).parameters,
    reason="clean-fid 0.1.35 needs SciPy < 1.18",
)
@pytest.mark.filterwarnings("ignore:The `disp` argument:DeprecationWarning")
def test_frechet_distance_is_the_one_of_clean_fid(n, dims, rel):
    a = statistics(gaussian_features(n=n, dims=dims, seed=1))
    b = statistics(gaussian_features(n=n, dims=dims, seed=2, shift=0.3))
    wanted = cleanfid.fid.frechet_distance(a.mean, a.cov, b.mean, b.cov)
    assert frechet_distance(a, b) == pytest.approx(wanted, rel=rel)


def test_frechet_distance_holds_with_many_fewer_images_than_features():
    """Twin: tr (cov_a cov_b)^(1/2) is the sum of the singular values of A B^T, A and B centred and scaled."""
    a, b = gaussian_features(n=20, dims=200, seed=1), gaussian_features(n=30, dims=200, seed=2, shift=0.3)
    centred = [
        (x - x.mean(axis=0)) / np.sqrt(len(x) - 1) for x in (a.astype(np.float64), b.astype(np.float64))
    ]
    difference = a.astype(np.float64).mean(axis=0) - b.astype(np.float64).mean(axis=0)
    overlap = np.linalg.svd(centred[0] @ centred[1].T, compute_uv=False).sum()
    wanted = difference @ difference + sum((x**2).sum() for x in centred) - 2 * overlap
    assert frechet_distance(statistics(a), statistics(b)) == pytest.approx(
        wanted, rel=1e-10
    )  # float64 both; 1e-15 is seen


@pytest.mark.parametrize("n", [30, 400])
def test_frechet_distance_is_symmetric_and_zero_for_equal_sets(n):
    a = statistics(gaussian_features(n=n, dims=64, seed=1))
    b = statistics(gaussian_features(n=n + 7, dims=64, seed=2))
    # the traces are about 8,000: rounding of float64 in their difference
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a), rel=1e-10)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-8)


def test_frechet_distance_of_images_that_are_all_the_same_is_that_of_the_means():
    a, b = statistics(np.zeros((5, 3))), statistics(np.full((5, 3), 2.0))
    assert frechet_distance(a, b) == 12.0


def test_statistics_are_float64_and_over_n_minus_one():
    features = gaussian_features(n=9, dims=4, seed=3)
    found = statistics(features)
    centred = features.astype(np.float64) - features.astype(np.float64).mean(axis=0)
    assert found.cov.dtype == np.float64 and found.n == 9
    np.testing.assert_allclose(
        found.cov, centred.T @ centred / 8, rtol=1e-12
    )  # the same sums in another order


def slow_kernel_distance(a: np.ndarray, b: np.ndarray) -> float:
    """Average the kernel over pairs of different rows within the sets, and over all pairs between them."""

    def kernel(x: np.ndarray, y: np.ndarray) -> float:
        return float((x @ y / len(x) + 1) ** 3)

    def within(x: np.ndarray) -> float:
        return float(np.mean([kernel(x[i], x[j]) for i in range(len(x)) for j in range(len(x)) if i != j]))

    return within(a) + within(b) - 2 * float(np.mean([kernel(x, y) for x in a for y in b]))


def test_kernel_distance_of_small_sets_is_the_unbiased_mmd_of_the_whole_sets():
    a, b = np.random.default_rng(0).normal(size=(2, 20, 6))
    # float64 sums of 400 terms
    assert kernel_distance(a, b + 0.5, seed=0) == pytest.approx(slow_kernel_distance(a, b + 0.5), rel=1e-9)


@pytest.mark.parametrize("n", range(2, 11))
def test_distances_of_two_to_ten_images_are_finite_and_those_of_the_slow_way(n):
    a, b = np.random.default_rng(n).normal(size=(2, n, 40))
    b += 0.5
    assert kernel_distance(a, b, seed=0) == pytest.approx(slow_kernel_distance(a, b), rel=1e-9)
    centred = [(x - x.mean(0)) / np.sqrt(n - 1) for x in (a, b)]
    overlap = np.linalg.svd(centred[0] @ centred[1].T, compute_uv=False).sum()
    wanted = ((a.mean(0) - b.mean(0)) ** 2).sum() + sum((x**2).sum() for x in centred) - 2 * overlap
    # Roots of eigenvalues of rank n - 1: 1e-10 is seen.
    assert frechet_distance(statistics(a), statistics(b)) == pytest.approx(wanted, rel=1e-7)


def test_features_whose_squares_are_no_numbers_are_refused():
    features = statistics(np.array([[1e200], [-1e200]]))
    with pytest.raises(ValueError, match="too large"):
        frechet_distance(features, features)


def test_kernel_distance_depends_on_its_seed_alone_and_leaves_the_global_generator_alone():
    a = gaussian_features(n=60, dims=8, seed=1)
    b = gaussian_features(n=40, dims=8, seed=2)
    np.random.seed(5)
    first = kernel_distance(a, b, seed=3)
    after = np.random.random()
    np.random.seed(6)
    assert kernel_distance(a, b, seed=3) == first
    assert kernel_distance(a, b, seed=4) != first
    np.random.seed(5)
    assert after == np.random.random()


def test_kernel_distance_is_near_zero_on_average_for_equal_distributions():
    rng = np.random.default_rng(0)
    draws = [kernel_distance(*rng.normal(size=(2, 50, 8)), seed=0) for _ in range(200)]
    shifted = kernel_distance(*(rng.normal(size=(2, 50, 8)) + [[[0]], [[1]]]), seed=0)
    standard_error = np.std(draws) / np.sqrt(len(draws))
    assert (
        abs(np.mean(draws)) < 4 * standard_error
    )  # an unbiased mean leaves this once in 16,000 seeds; ours is fixed
    assert shifted > 10 * np.std(draws)


@pytest.mark.parametrize("features", [np.zeros((1, 4)), np.zeros(4), np.full((3, 4), np.nan)])
def test_features_that_give_no_distance_are_refused(features):
    with pytest.raises(ValueError, match="expected"):
        statistics(features)
    with pytest.raises(ValueError, match="expected"):
        kernel_distance(features, np.zeros((3, 4)), seed=0)


def test_sets_of_different_width_are_refused():
    a, b = np.zeros((3, 4)), np.zeros((3, 5))
    with pytest.raises(ValueError, match="width 4 and 5"):
        frechet_distance(statistics(a), statistics(b))
    with pytest.raises(ValueError, match="width 4 and 5"):
        kernel_distance(a, b, seed=0)


def test_small_samples_carry_a_note_and_large_ones_none():
    note = sample_size_note("fd_efficientnet_lite0", n=500, dims=1_280)
    assert "fd_efficientnet_lite0 with N=500" in note and "biased upwards" in note
    assert sample_size_note("fid", n=30_000, dims=2_048) == ""
