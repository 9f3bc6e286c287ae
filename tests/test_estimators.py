import numpy as np
import pytest
from keras import ops
from quantizer_checks import array, gradient, latents

from vqbeam.vqvae.quantizers.estimators import ESTIMATORS, diveq, rotation_trick, straight_through

D = 5
Z, E, G = (latents(7, D, seed=seed) for seed in range(3))


@pytest.mark.parametrize("name", sorted(ESTIMATORS))
def test_value_is_that_of_the_code(name):
    np.testing.assert_allclose(array(ESTIMATORS[name](Z, E)), E, atol=1e-6)


@pytest.mark.backend
def test_straight_through_passes_the_gradient_as_it_is():
    found = gradient(lambda z: ops.sum(straight_through(z, E) * G), Z)
    np.testing.assert_allclose(found, G, rtol=1e-6)
    found = gradient(lambda e: ops.sum(straight_through(Z, e) * G), E)
    np.testing.assert_array_equal(found, 0)


def rotation(z, e):
    """The matrix of Fifty et al. 2024, section 4.2, that takes z to e."""
    u, q = z / np.linalg.norm(z), e / np.linalg.norm(e)
    w = (u + q) / np.linalg.norm(u + q)
    matrix = np.eye(len(z)) - 2 * np.outer(w, w) + 2 * np.outer(q, u)
    return np.linalg.norm(e) / np.linalg.norm(z) * matrix


def test_rotation_in_numpy():
    for z, e in zip(np.float64(Z), np.float64(E), strict=True):
        matrix = rotation(z, e)
        np.testing.assert_allclose(matrix @ z, e, atol=1e-9)
        scale = np.linalg.norm(e) / np.linalg.norm(z)
        np.testing.assert_allclose(matrix @ matrix.T / scale**2, np.eye(D), atol=1e-9)


@pytest.mark.backend
def test_rotation_turns_the_gradient():
    expected = [rotation(z, e).T @ g for z, e, g in zip(*map(np.float64, (Z, E, G)), strict=True)]
    found = gradient(lambda z: ops.sum(rotation_trick(z, E) * G), Z)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    assert np.abs(found - G).max() > 0.1
    found = gradient(lambda e: ops.sum(rotation_trick(Z, e) * G), E)
    np.testing.assert_array_equal(found, 0)


def test_rotation_keeps_the_angle_between_gradient_and_vector():
    found = gradient(lambda z: ops.sum(rotation_trick(z, E) * G), Z)
    lengths = np.linalg.norm(E, axis=1) / np.linalg.norm(Z, axis=1)
    np.testing.assert_allclose((found * Z).sum(1), (G * E).sum(1), rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(
        np.linalg.norm(found, axis=1), lengths * np.linalg.norm(G, axis=1), rtol=1e-4
    )


@pytest.mark.backend
def test_diveq_drops_the_gradient_along_the_error():
    u = np.float64(E - Z)
    u /= np.linalg.norm(u, axis=1, keepdims=True)
    expected = G - (G * u).sum(1, keepdims=True) * u
    found = gradient(lambda z: ops.sum(diveq(z, E) * G), Z)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose((found * u).sum(1), 0, atol=1e-5)
    assert np.abs(found - G).max() > 0.1
    found = gradient(lambda e: ops.sum(diveq(Z, e) * G), E)
    np.testing.assert_array_equal(found, 0)


def test_diveq_is_the_reparameterization():
    # e = z + ‖e − z‖ u, of which all but z is constant.
    u = ops.convert_to_tensor((E - Z) / np.linalg.norm(E - Z, axis=1, keepdims=True))

    def moved(z):
        length = ops.sqrt(ops.sum(ops.square(E - z), -1, keepdims=True))
        return ops.sum((z + length * u) * G)

    found = gradient(lambda z: ops.sum(diveq(z, E) * G), Z)
    np.testing.assert_allclose(found, gradient(moved, Z), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    "z",
    [pytest.param(E, marks=pytest.mark.backend), E + 1e-20],
    ids=["at the code", "next to it"],
)
def test_diveq_where_there_is_no_error(z):
    np.testing.assert_allclose(array(diveq(z, E)), E, rtol=1e-6)
    found = gradient(lambda x: ops.sum(diveq(x, E) * G), z)
    np.testing.assert_allclose(found, G, rtol=1e-4, atol=1e-5)


def test_rotation_where_z_is_the_code():
    np.testing.assert_allclose(array(rotation_trick(E, E)), E, rtol=1e-5)
    found = gradient(lambda z: ops.sum(rotation_trick(z, E) * G), E)
    np.testing.assert_allclose(found, G, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("z", "e"),
    [
        pytest.param(0 * Z, E, marks=pytest.mark.backend),
        (Z, 0 * E),
        (0 * Z, 0 * E),
        pytest.param(Z, -Z, marks=pytest.mark.backend),
        (1e-20 * Z, E),
        (Z, 1e-20 * E),
    ],
    ids=["z 0", "e 0", "both 0", "opposite", "z tiny", "e tiny"],
)
def test_rotation_without_a_direction(z, e):
    value = array(rotation_trick(z, e))
    np.testing.assert_allclose(value, e, rtol=1e-5, atol=1e-5)
    found = gradient(lambda x: ops.sum(rotation_trick(x, e) * G), z)
    assert np.isfinite(found).all()
