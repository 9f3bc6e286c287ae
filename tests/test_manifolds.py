import numpy as np
import pytest

import vqbeam.pipelines.evaluation.distances as manifolds
from vqbeam.pipelines.evaluation.distances import Manifold, nearest, overlap


def line(*places):
    """Points on a line in three dimensions, so that their distances are those of their places."""
    return np.outer(places, [2 / 3, 2 / 3, 1 / 3]) + 100


def test_radii_on_a_line():
    places = (0, 1, 3, 7, 20)
    one, three = (Manifold(line(*places), k) for k in (1, 3))
    assert one.radii == pytest.approx(np.square([1, 1, 2, 4, 13]), rel=1e-3)
    assert three.radii == pytest.approx(np.square([7, 6, 4, 7, 19]), rel=1e-3)
    assert one.radii.dtype == np.float32


def test_overlap_on_a_line():
    # Balls of 1 around 0 and 1, of 9 around 10.
    real = Manifold(line(0, 1, 10), 1)
    # Balls of 0.2 around 0.4 and 0.6, of 29.4 around 30.
    other = Manifold(line(0.4, 0.6, 30), 1)
    # 0.4 and 0.6 look real, 30 does not; 30's ball alone reaches 1 and 10, and none reaches 0.
    # The balls around 0 and 1 hold two each, that around 10 none.
    assert overlap(real, other) == pytest.approx((2 / 3, 2 / 3, 4 / 3, 2 / 3))
    # 1 and 10 are in the ball of 30, and 0 in none.
    assert overlap(other, real) == pytest.approx((2 / 3, 2 / 3, 2 / 3, 1 / 3))


def test_few_but_true_and_many_but_false():
    numbers = np.random.default_rng(0)
    real = numbers.normal(size=(300, 4))
    narrow = Manifold(numbers.normal(size=(300, 4)) * 0.1)
    wide = Manifold(numbers.normal(size=(300, 4)) * 20)
    real = Manifold(real)
    found = overlap(real, narrow)
    assert found.precision > 0.95 and found.density > 1
    assert found.recall < 0.2 and found.coverage < 0.7
    found = overlap(real, wide)
    assert found.precision < 0.2 and found.recall > 0.9
    # Balls that are large for being far from all others count for recall, and not for coverage.
    assert found.coverage < 0.2 and found.density < 0.2


@pytest.mark.parametrize("block", [1, 700, 10**6])
def test_in_numpy_whatever_the_blocks(monkeypatch, block):
    monkeypatch.setattr(manifolds, "_BLOCK", block)
    numbers = np.random.default_rng(1)
    first, second = numbers.normal(size=(40, 5)), numbers.normal(size=(50, 5)) + 0.5

    def distances(a, b):
        return np.linalg.norm(a[:, None] - b[None], axis=-1)

    radii = [np.sort(distances(x, x), axis=1)[:, 3] for x in (first, second)]
    across = distances(second, first)
    in_first, in_second = across <= radii[0], across.T <= radii[1]
    expected = dict(
        precision=in_first.any(axis=1).mean(),
        recall=in_second.any(axis=1).mean(),
        density=in_first.sum() / (3 * 50),
        coverage=in_first.any(axis=0).mean(),
    )
    assert all(0 < value < 1 for value in expected.values())
    found = overlap(Manifold(first), Manifold(second))
    assert found._asdict() == pytest.approx(expected)


def test_a_set_and_itself():
    points = Manifold(np.random.default_rng(2).normal(size=(30, 3)))
    found = overlap(points, points)
    # Each ball holds its centre and three neighbours, of which rounding may leave out the farthest.
    assert found == pytest.approx((1, 1, 4 / 3, 1), abs=0.1)


def test_too_few_for_neighbours():
    with pytest.raises(ValueError, match="3 features have no 3 neighbours each"):
        Manifold(np.zeros((3, 2)))


def test_nearest_is_that_of_all_pairs(monkeypatch):
    monkeypatch.setattr(manifolds, "_BLOCK", 100)  # several blocks
    rng = np.random.default_rng(0)
    ones, others = (rng.normal(100, 1, (n, 3)).astype("float32") for n in (40, 30))
    pairs = np.linalg.norm(ones[:, None].astype("float64") - others, axis=-1)
    found, rows = nearest(ones, others)
    np.testing.assert_array_equal(rows, pairs.argmin(axis=1))
    np.testing.assert_allclose(found, pairs.min(axis=1), rtol=1e-3)
