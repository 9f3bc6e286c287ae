import numpy as np
import pytest
from keras import ops
from quantizer_checks import array, latents, nearest_codes

from vqbeam.vqvae.quantizers.nearest import initial_codebook


def initial(vectors, num_codes, method, seed=0):
    codebook, counts = initial_codebook(
        ops.convert_to_tensor(vectors), num_codes, method, seed=seed
    )
    return array(codebook), array(counts)


def inertia(vectors, codebook):
    return np.square(vectors - codebook[nearest_codes(vectors, codebook)]).sum()


def lloyd(vectors, num_codes, seed, iterations):
    """The algorithm in NumPy, from the same random choices."""
    numbers = np.random.default_rng(seed)

    def draw():
        return vectors[numbers.choice(len(vectors), num_codes, replace=len(vectors) < num_codes)]

    codebook = np.float64(draw())
    for _ in range(iterations):
        codes, drawn = nearest_codes(vectors, codebook), draw()
        codebook = np.stack(
            [
                vectors[codes == code].mean(0) if (codes == code).any() else drawn[code]
                for code in range(num_codes)
            ]
        )
    return codebook


@pytest.mark.parametrize(
    ("method", "iterations"), [("data", 0), pytest.param("kmeans", 10, marks=pytest.mark.backend)]
)
def test_in_numpy(method, iterations):
    vectors = latents(70, 3)
    codebook, counts = initial(vectors, 6, method, seed=3)
    np.testing.assert_allclose(codebook, lloyd(vectors, 6, 3, iterations), rtol=1e-4, atol=1e-5)
    expected = np.bincount(nearest_codes(vectors, codebook), minlength=6)
    np.testing.assert_array_equal(counts, expected)
    assert counts.dtype == np.float32 and counts.sum() == 70


def test_data_are_vectors_each_taken_once():
    vectors = latents(12, 3)
    codebook, counts = initial(vectors, 12, "data")
    assert sorted(map(tuple, codebook)) == sorted(map(tuple, vectors))
    np.testing.assert_array_equal(counts, 1)


def test_clusters_fit_better_than_data():
    vectors = latents(200, 4)
    errors = [inertia(vectors, initial(vectors, 8, method)[0]) for method in ("data", "kmeans")]
    assert errors[1] < 0.8 * errors[0]


@pytest.mark.backend
def test_empty_clusters_begin_again_at_a_vector():
    # All but two of the vectors are one and the same: most of what is drawn ties, and stays empty.
    vectors = np.ones((40, 2), "float32")
    vectors[:2] = [[5, 5], [-5, -5]]
    codebook, counts = initial(vectors, 4, "kmeans")
    distances = np.abs(vectors[:, None] - codebook).max(-1).min(0)
    np.testing.assert_array_equal(distances[counts == 0], 0)
    assert np.isfinite(codebook).all() and counts.sum() == 40


@pytest.mark.parametrize("method", ["data", "kmeans"])
def test_fewer_vectors_than_codes(method):
    vectors = latents(3, 2)
    codebook, counts = initial(vectors, 8, method)
    assert codebook.shape == (8, 2) and counts.sum() == 3
    assert np.isfinite(codebook).all()


def test_depends_on_the_seed_alone():
    vectors = latents(50, 3)
    one, same, other = (initial(vectors, 5, "data", seed=seed)[0] for seed in (0, 0, 1))
    np.testing.assert_array_equal(one, same)
    assert (one != other).any()


def test_refuses_another_method():
    with pytest.raises(ValueError, match="method is 'pca'; choose 'data' or 'kmeans'"):
        initial(latents(5, 2), 2, "pca")
