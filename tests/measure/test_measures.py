"""MIND, CMMD and the intervals of all distances, beside slow twins and beside drawings that were made anew."""

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment

from t2i.errors import DataError
from t2i.measure import mmd, sliced
from t2i.measure.distances import frechet_distance, frechet_distances, kernel_distance, statistics
from t2i.measure.feature_cache import with_statistics
from t2i.measure.measures import bootstrap_counts, distances_on, interval_of, measure, replicates_for


def gaussian(n, dims=12, *, seed, shift=0.0):
    mixing = np.random.default_rng(99).normal(size=(dims, dims))
    return (np.random.default_rng(seed).normal(size=(n, dims)) @ mixing + shift).astype(np.float32)


def once(n):
    return np.ones((1, n), dtype=np.int64)


def slow_mind(a, b):
    """Pair points on each line by an assignment that knows nothing of sorting; sets of equal size."""
    rng, costs = np.random.default_rng(0), []
    # The stream of directions is the protocol's: a hundred at a time, as rows.
    for _ in range(10):
        for direction in rng.standard_normal((100, a.shape[1])):
            unit = direction / np.sqrt((direction**2).sum())
            cost = ((a @ unit)[:, None] - (b @ unit)[None, :]) ** 2
            rows, columns = linear_sum_assignment(cost)
            costs.append(cost[rows, columns].mean())
    return 3 * a.shape[1] * np.mean(costs)


def test_mind_is_optimal_transport_on_a_thousand_lines():
    a, b = gaussian(9, 5, seed=1).astype(float), gaussian(9, 5, seed=2, shift=0.4).astype(float)
    assert sliced.sliced_distance(a, b) == pytest.approx(slow_mind(a, b), rel=1e-9)


def test_mind_of_unequal_sets_is_that_of_their_distributions():
    a, b = gaussian(6, 4, seed=1), gaussian(4, 4, seed=2)
    # Twelve points each: every one of the first set twice, every one of the second three times.
    repeated = sliced.sliced_distance(np.repeat(a, 2, axis=0), np.repeat(b, 3, axis=0))
    assert sliced.sliced_distance(a, b) == pytest.approx(repeated, rel=1e-12)
    assert sliced.sliced_distance(a, a) == 0


def test_mind_of_a_shift_is_three_times_its_square():
    # On a line, a shift by s costs (s.u)^2, whose mean over directions is |s|^2 / D.
    a = gaussian(50, 40, seed=3).astype(float)
    assert sliced.sliced_distance(a, a + 0.5) == pytest.approx(3 * 40 * 0.25, rel=0.1)  # 1,000 directions


def slow_cmmd(a, b):
    def unit(x):
        return x / np.sqrt((x**2).sum())

    def mean(x, y):
        return np.mean([np.exp(-((unit(p) - unit(q)) ** 2).sum() / 200) for p in x for q in y])

    return 1000 * (mean(a, a) + mean(b, b) - 2 * mean(a, b))


def test_cmmd_is_the_papers_formula():
    a, b = gaussian(7, seed=1), gaussian(11, seed=2, shift=0.5)
    assert mmd.clip_distance(a, b) == pytest.approx(slow_cmmd(a.astype(float), b.astype(float)), rel=1e-8)


@pytest.mark.parametrize(("n", "m"), [(30, 25), (8, 40), (40, 8)])
def test_every_image_once_is_no_resampling(n, m):
    a, b = gaussian(n, seed=1), gaussian(m, seed=2, shift=0.3)
    frechet = frechet_distance(statistics(a), statistics(b))
    assert frechet_distances(a, b, counts=once(n))[0] == pytest.approx(frechet, rel=1e-7)
    if n == m:
        kid = kernel_distance(a, b, seed=0)
        assert mmd.kernel_distances(a, b, counts=once(n))[0] == pytest.approx(kid, rel=1e-9)


def test_kid_of_every_image_once_is_clean_fids():
    a, b = gaussian(30, seed=1), gaussian(30, seed=2, shift=0.3)
    found = mmd.kernel_distances(a, b, counts=once(30))[0]
    assert found == pytest.approx(kernel_distance(a, b, seed=0), rel=1e-9)


def test_a_resampling_is_the_distance_of_the_images_drawn(monkeypatch):
    monkeypatch.setattr(mmd, "CHUNK", 4)  # chunks of kernel rows must add up
    a, b = gaussian(10, seed=1), gaussian(7, seed=2, shift=0.3)
    counts = np.array([3, 0, 1, 1, 0, 2, 1, 0, 1, 1])
    drawn = np.repeat(a, counts, axis=0)
    wanted = frechet_distance(statistics(drawn), statistics(b))
    assert frechet_distances(a, b, counts=counts[None])[0] == pytest.approx(wanted, rel=1e-7)
    mind = sliced.sliced_distance(drawn, b)
    assert sliced.sliced_distances(a, b, counts=counts[None])[0] == pytest.approx(mind, rel=1e-12)

    def twin(kernel, scale, x, y):
        """Average over pairs of drawn images that are not the same image."""
        names = np.repeat(np.arange(10), counts)
        pairs = [(i, j) for i in range(10) for j in range(10) if names[i] != names[j]]
        own = np.mean([kernel(x[i], x[j]) for i, j in pairs])
        other = np.mean([kernel(y[i], y[j]) for i in range(7) for j in range(7) if i != j])
        return scale * (own + other - 2 * np.mean([kernel(p, q) for p in x for q in y]))

    x, y = drawn.astype(float), b.astype(float)
    cubic = twin(lambda p, q: (p @ q / 12 + 1) ** 3, 1, x, y)
    assert mmd.kernel_distances(a, b, counts=counts[None])[0] == pytest.approx(cubic, rel=1e-9)
    unit = [z / np.linalg.norm(z, axis=1, keepdims=True) for z in (x, y)]
    rbf = twin(lambda p, q: np.exp(-((p - q) ** 2).sum() / 200), 1000, *unit)
    assert mmd.clip_distances(a, b, counts=counts[None])[0] == pytest.approx(rbf, rel=1e-8)


@pytest.mark.parametrize("key", ["fd_clip", "kd_clip", "mind_clip", "cmmd"])
def test_an_interval_is_as_wide_as_drawings_made_anew_spread(key, monkeypatch):
    monkeypatch.setattr(sliced, "PROJECTIONS", 100)
    reference = with_statistics(gaussian(150, 6, seed=0))
    distance = distances_on("clip")[key]
    drawings = [with_statistics(gaussian(150, 6, seed=seed, shift=0.6)) for seed in range(1, 121)]
    values = [distance.value(made, reference) for made in drawings]
    spread = np.std(values, ddof=1)
    widths = []
    for made in drawings[:12]:
        low, high = measure(made, reference, features="clip", replicates=60)[key].interval
        widths.append((high - low) / 2 / 1.96)
    # 120 drawings tell the spread to 6%, and twelve intervals of 60 resamplings their mean to 3%.
    assert np.mean(widths) == pytest.approx(spread, rel=0.25)


def test_an_interval_of_fewer_images_than_features_is_wide_and_never_narrow():
    """Resamplings differ in how many images they have, and the bias of a Frechet distance with them."""
    scales = 1 / np.arange(1, 97) ** 0.5

    def drawn(seed):
        return (np.random.default_rng(seed).normal(size=(40, 96)) * scales).astype(np.float32)

    reference = with_statistics(drawn(0))
    distance = distances_on("clip")["fd_clip"]
    drawings = [with_statistics(drawn(seed)) for seed in range(1, 61)]
    spread = np.std([distance.value(made, reference) for made in drawings], ddof=1)
    bounds = [
        measure(made, reference, features="clip", replicates=40)["fd_clip"].interval for made in drawings[:4]
    ]
    ratio = np.mean([(high - low) / 2 / 1.96 for low, high in bounds]) / spread
    assert 1 < ratio < 2.5


def test_intervals_are_made_unasked_of_few_images_only():
    assert [replicates_for(None, n=n) for n in (5_000, 5_001)] == [100, 0]
    assert [replicates_for(asked, n=30_000) for asked in (0, 20)] == [0, 20]
    made = with_statistics(gaussian(20, 4, seed=1))
    found = measure(made, made, features="inception", replicates=0)
    assert list(found) == ["fid", "kid", "mind"] and all(each.interval is None for each in found.values())


def test_two_images_have_no_interval_rather_than_one_of_nan():
    # Half of their resamplings are one image twice, which has no pair of two images.
    few, many = (with_statistics(gaussian(n, 4, seed=1)) for n in (2, 10))
    assert all(one.interval is None for one in measure(few, many, features="clip", replicates=20).values())
    enough = measure(many, many, features="clip", replicates=20)
    assert all(np.isfinite(one.interval).all() for one in enough.values())


def test_resamplings_are_of_n_images_and_the_same_each_time():
    counts = bootstrap_counts(50, replicates=7)
    assert counts.shape == (7, 50) and (counts.sum(1) == 50).all()
    np.testing.assert_array_equal(counts, bootstrap_counts(50, replicates=7))
    assert interval_of(2.0, np.array([1.0, 3.0])) == pytest.approx((2 - 1.96 * 2**0.5, 2 + 1.96 * 2**0.5))


@pytest.mark.parametrize("compute", [sliced.sliced_distance, mmd.clip_distance])
def test_sets_that_cannot_be_compared_are_refused(compute):
    with pytest.raises(DataError, match="width 4 and 5"):
        compute(np.zeros((3, 4)), np.zeros((3, 5)))
    with pytest.raises(DataError, match="N >= 2"):
        compute(np.zeros((1, 4)), np.zeros((3, 4)))
    with pytest.raises(DataError, match="NaN"):
        compute(np.full((3, 4), np.nan), np.zeros((3, 4)))


def test_mind_is_that_of_torch_fidelity_up_to_the_directions():
    """Its formula, said again: equal sets, torch's random directions, sorted and squared."""
    a, b = (torch.from_numpy(gaussian(200, 24, seed=seed, shift=seed / 5)) for seed in (1, 2))
    directions = torch.randn((1_000, 24), generator=torch.Generator().manual_seed(7))
    directions /= directions.norm(dim=1, keepdim=True)
    sides = [(directions @ side.T).sort(dim=1).values for side in (a, b)]
    wanted = 3 * 24 * ((sides[0] - sides[1]) ** 2).mean().item()
    # Other directions: the mean of 1,000 differs by 3% or so.
    assert sliced.sliced_distance(a.numpy(), b.numpy()) == pytest.approx(wanted, rel=0.15)
