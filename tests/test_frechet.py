import numpy as np
import pytest

from vqbeam.pipelines.evaluation.distances import Gaussian, Moments, frechet_distance


def moments(features, *cuts):
    result = Moments()
    for batch in np.split(features, cuts):
        result.add(batch)
    return result


def random_gaussian(seed, *, dim=6, rank=6):
    numbers = np.random.default_rng(seed)
    factor = numbers.normal(size=(dim, rank))
    return Gaussian(numbers.normal(size=dim), factor @ factor.T)


@pytest.mark.parametrize("cuts", [(), (1,), (20, 33)])
def test_moments_are_those_of_numpy(cuts):
    features = np.random.default_rng(0).normal(size=(50, 4)) @ np.diag([1, 2, 3, 0])
    found = moments(features, *cuts)
    assert found.count == 50
    mean, covariance = found.gaussian()
    np.testing.assert_allclose(mean, features.mean(axis=0), atol=1e-12)
    np.testing.assert_allclose(covariance, np.cov(features, rowvar=False), atol=1e-12)


def test_moments_far_from_zero_keep_their_digits():
    features = np.random.default_rng(0).normal(size=(60, 3))
    found = moments(features + 1e9, 20, 40).gaussian().covariance
    # A sum of squares of 1e18 has no digit left below 100.
    np.testing.assert_allclose(found, np.cov(features, rowvar=False), atol=1e-5)


def test_moments_of_small_floats_are_summed_in_float64():
    features = np.random.default_rng(0).normal(1, 1e-3, size=(1000, 2)).astype("float32")
    expected = np.cov(features.astype("float64"), rowvar=False)
    found = moments(features, 300, 700).gaussian()
    assert found.mean.dtype == found.covariance.dtype == np.float64
    np.testing.assert_allclose(found.covariance, expected, rtol=1e-9)


@pytest.mark.parametrize("count", [0, 1])
def test_a_covariance_needs_two(count):
    found = Moments()
    if count:
        found.add(np.zeros((1, 3)))
    with pytest.raises(ValueError, match=f"at least 2 features, and there are {count}"):
        found.gaussian()


def test_diagonal_covariances_have_a_closed_form():
    first = Gaussian(np.array([0.0, 1, 2]), np.diag([1.0, 4, 9]))
    second = Gaussian(np.array([1.0, 1, 0]), np.diag([4.0, 4, 0]))
    # Σ (m₁ − m₂)² + (σ₁ − σ₂)²
    assert frechet_distance(first, second) == pytest.approx(1 + 4 + 1 + 0 + 9)


def test_covariances_that_do_not_commute():
    first, second = random_gaussian(0), random_gaussian(1)
    product = np.linalg.eigvals(first.covariance @ second.covariance)
    trace = np.trace(first.covariance) + np.trace(second.covariance)
    squared = np.square(first.mean - second.mean).sum()
    expected = squared + trace - 2 * np.sqrt(product.real).sum()
    assert frechet_distance(first, second) == pytest.approx(expected, rel=1e-9)
    assert frechet_distance(second, first) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("rank", [0, 2, 6])
def test_equal_gaussians_and_shifted_ones(rank):
    one = random_gaussian(3, rank=rank)
    assert 0 <= frechet_distance(one, one) < 1e-12
    shift = np.arange(6.0)
    moved = one._replace(mean=one.mean + shift)
    assert frechet_distance(one, moved) == pytest.approx(shift @ shift, abs=1e-10)


def test_rank_deficient_covariances():
    numbers = np.random.default_rng(0)
    # Five features of twenty dimensions, and the same turned: the distance turns with them.
    first, second = numbers.normal(size=(2, 5, 20))
    turn, _ = np.linalg.qr(numbers.normal(size=(20, 20)))
    plain = frechet_distance(moments(first).gaussian(), moments(second).gaussian())
    turned = frechet_distance(moments(first @ turn).gaussian(), moments(second @ turn).gaussian())
    assert plain == pytest.approx(turned, rel=1e-9)
    # On orthogonal subspaces nothing overlaps: the traces alone remain.
    apart = (
        Gaussian(np.zeros(4), np.diag([1.0, 2, 0, 0])),
        Gaussian(np.zeros(4), np.diag([0.0, 0, 3, 4])),
    )
    assert frechet_distance(*apart) == pytest.approx(10)
