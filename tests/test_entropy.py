import keras
import numpy as np
import pytest
from keras import ops

from vqbeam.vqvae.quantizers.base import entropy_loss

NUMBERS = np.random.default_rng(0)
CODEBOOK = NUMBERS.normal(size=(5, 3)).astype("float32")
VECTORS = NUMBERS.normal(size=(40, 3)).astype("float32")


def chosen(vectors, codebook):
    distances = np.square(vectors[:, None] - codebook).sum(-1)
    return codebook[distances.argmin(1)]


def by_definition(vectors, codebook):
    distances = np.square(np.float64(vectors)[:, None] - codebook).sum(-1)
    p = np.exp(-distances / distances.min(1).mean())
    p /= p.sum(1, keepdims=True)
    mean = p.mean(0)
    return -(p * np.log(p)).sum(1).mean() + (mean * np.log(mean)).sum()


def loss(vectors, codebook):
    return float(entropy_loss(vectors, chosen(vectors, codebook), codebook))


@pytest.mark.backend
def test_by_definition():
    np.testing.assert_allclose(loss(VECTORS, CODEBOOK), by_definition(VECTORS, CODEBOOK), rtol=1e-5)


@pytest.mark.parametrize("scale", [0.01, 100.0])
def test_is_the_same_at_any_scale(scale):
    scaled = loss(np.float32(scale * VECTORS), np.float32(scale * CODEBOOK))
    np.testing.assert_allclose(scaled, loss(VECTORS, CODEBOOK), rtol=1e-3)


def test_is_least_where_vectors_are_sure_and_codes_alike():
    far = np.float32(100 * np.eye(4))
    at_the_codes = np.tile(far, (6, 1)) + np.float32(NUMBERS.normal(size=(24, 4)))
    np.testing.assert_allclose(loss(at_the_codes, far), -np.log(4), rtol=1e-3)
    at_one_code = far[:1] + np.float32(NUMBERS.normal(size=(24, 4)))
    np.testing.assert_allclose(loss(at_one_code, far), 0, atol=1e-3)


def test_vectors_on_their_codes_do_not_divide_by_zero():
    assert np.isfinite(loss(CODEBOOK, CODEBOOK))


@pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="GradientTape is TensorFlow's")
def test_gradient_reaches_the_vectors_alone():
    import tensorflow as tf

    vectors, codebook = tf.constant(VECTORS), tf.constant(CODEBOOK)
    with tf.GradientTape() as tape:
        tape.watch([vectors, codebook])
        value = entropy_loss(vectors, ops.take(codebook, np.arange(40) % 5, axis=0), codebook)
    at_vectors, at_codebook = tape.gradient(value, [vectors, codebook])
    assert np.abs(at_vectors).max() > 0 and at_codebook is None
