"""Where gradients flow in the families of quantizers beside the plain one."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from gradient_fixtures import (
    BETA,
    IMAGES,
    D,
    K,
    build,
    decoder_weights,
    encoder_weights,
    none_reach,
    some_reach,
    values,
)

from vqbeam.vqvae.quantizers.fsq import FiniteScalarQuantizer
from vqbeam.vqvae.quantizers.lfq import LookupFreeQuantizer
from vqbeam.vqvae.quantizers.predictive import PredictiveQuantizer
from vqbeam.vqvae.quantizers.residual import ResidualQuantizer
from vqbeam.vqvae.quantizers.simvq import SimVQ
from vqbeam.vqvae.quantizers.vector import VectorQuantizer

pytestmark = pytest.mark.skipif(
    keras.backend.backend() != "tensorflow", reason="GradientTape is TensorFlow's"
)

NUMBERS = np.random.default_rng(0)
Z = NUMBERS.normal(size=(40, D)).astype("float32")
UPSTREAM = NUMBERS.normal(size=(40, D)).astype("float32")


def built(quantizer, spread=1.0):
    keras.utils.set_random_seed(0)
    quantizer.build((None, D))
    numbers = np.random.default_rng(1)
    for inner in getattr(quantizer, "quantizers", [quantizer]):
        if hasattr(inner, "codebook"):
            inner.codebook.assign(numbers.normal(size=(K, D)) * spread)
    return quantizer


def traced(quantizer, training=False):
    """Returns a tape, z as it watches it, and what the quantizer makes of z."""
    z = tf.constant(Z)
    with tf.GradientTape(persistent=True) as tape:
        tape.watch(z)
        result = quantizer(z, training=training)
        through = tf.reduce_sum(UPSTREAM * result.quantized)
    return tape, z, result, through


def unit(vectors):
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)


def test_rotation_gradient_in_closed_form():
    quantizer = built(VectorQuantizer(K, D, estimator="rotation"))
    tape, z, result, through = traced(quantizer)
    e = np.float64(quantizer.codebook.numpy()[result.codes.numpy()])
    np.testing.assert_allclose(result.quantized, e, rtol=1e-4, atol=1e-6)
    u, q = unit(np.float64(Z)), unit(e)
    w = unit(u + q)
    outer = np.einsum("ni,nj->nij", w, w), np.einsum("ni,nj->nij", q, u)
    rotation = np.eye(D) - 2 * outer[0] + 2 * outer[1]
    for one, axis, turned in zip(rotation, u, q, strict=True):
        np.testing.assert_allclose(one.T @ one, np.eye(D), atol=1e-9)
        np.testing.assert_allclose(one @ axis, turned, atol=1e-9)
    scale = np.linalg.norm(e, axis=1) / np.linalg.norm(np.float64(Z), axis=1)
    expected = scale[:, None] * np.einsum("nij,ni->nj", rotation, UPSTREAM)
    np.testing.assert_allclose(tape.gradient(through, z), expected, rtol=1e-3, atol=1e-5)
    assert np.abs(expected - UPSTREAM).max() > 0.1  # straight through would be another


def test_rotation_gives_the_codebook_no_gradient():
    quantizer = built(VectorQuantizer(K, D, estimator="rotation", update="gradient"))
    tape, _, _, through = traced(quantizer)
    assert tape.gradient(through, quantizer.codebook.value) is None


def test_diveq_gives_the_predictions_what_z_does_not_get():
    quantizer = PredictiveQuantizer(K, D, estimator="diveq")
    quantizer.build((None, 4, 5, D))
    quantizer.vector.codebook.assign(np.random.default_rng(1).normal(size=(K, D)))
    z, upstream = (vectors.reshape(2, 4, 5, D) for vectors in (Z, UPSTREAM))
    with tf.GradientTape() as tape:
        watched = tf.constant(z)
        tape.watch(watched)
        quantized = quantizer(watched).quantized
        through = tf.reduce_sum(upstream * quantized)
    biases = [prediction.bias.value for prediction in quantizer.predictions]
    at_z, *at_biases = tape.gradient(through, [watched, *biases])
    u = unit(quantized.numpy() - z)
    along = (upstream * u).sum(-1, keepdims=True) * u
    np.testing.assert_allclose(at_z, upstream - along, rtol=1e-3, atol=1e-4)
    rows, columns = np.indices((4, 5))
    corners, sides = rows * columns % 2 == 1, rows % 2 != columns % 2
    for found, cells in zip(at_biases, (corners, sides), strict=True):
        np.testing.assert_allclose(found, along[:, cells].sum((0, 1)), rtol=1e-3, atol=1e-4)


def residual(**settings):
    return built(ResidualQuantizer(3, K, D, update="gradient", commitment=BETA, **settings))


def test_reconstruction_passes_all_levels_unchanged():
    quantizer = residual()
    tape, z, _, through = traced(quantizer)
    np.testing.assert_array_equal(tape.gradient(through, z), UPSTREAM)
    assert none_reach(tape.gradient(through, values(quantizer.trainable_variables)))


def test_a_levels_losses_reach_no_codebook_before_it():
    quantizer = residual()
    codebooks = [inner.codebook.value for inner in quantizer.quantizers]
    assert len(codebooks) == 3
    tape, z, result, _ = traced(quantizer)
    # Of the sum over the levels, and so of each.
    assert none_reach(tape.gradient(result.losses["commitment"], codebooks))
    assert tape.gradient(result.losses["codebook"], z) is None
    gradients = tape.gradient(result.losses["codebook"], codebooks)
    rest, at_z = np.float64(Z), 0
    for level, (codebook, gradient) in enumerate(zip(codebooks, gradients, strict=True)):
        codes = result.codes.numpy()[:, level]
        left = rest - codebook.numpy()[codes]
        expected = np.zeros((K, D))
        np.add.at(expected, codes, -2 / Z.size * left)  # no later level has added to it
        assert isinstance(gradient, tf.IndexedSlices)
        np.testing.assert_allclose(tf.convert_to_tensor(gradient), expected, atol=1e-6)
        rest = left
        at_z = at_z + BETA * 2 / Z.size * left
    commitment = tape.gradient(result.losses["commitment"], z)
    np.testing.assert_allclose(commitment, at_z, rtol=1e-3, atol=1e-6)


def test_simvq_moves_a_matrix_and_never_the_codebook():
    quantizer = built(SimVQ(K, D, commitment=BETA))
    assert [v.name for v in quantizer.trainable_variables] == ["projection"]
    tape, z, result, through = traced(quantizer, training=True)
    projection = quantizer.projection.value
    gradient = tape.gradient(result.losses["codebook"], projection)
    assert isinstance(gradient, tf.Tensor)  # dense
    fixed = np.float64(quantizer.codebook.numpy()[result.codes.numpy()])
    expected = 2 / Z.size * fixed.T @ (fixed @ projection.numpy() - Z)
    np.testing.assert_allclose(gradient, expected, rtol=1e-3, atol=1e-6)
    assert np.abs(expected).min() > 0
    assert tape.gradient(through, projection) is None
    assert tape.gradient(result.losses["commitment"], projection) is None
    np.testing.assert_array_equal(tape.gradient(through, z), UPSTREAM)
    before = quantizer.vectors().numpy()
    keras.optimizers.SGD(0.5).apply([gradient], [quantizer.projection])
    assert (quantizer.vectors().numpy() != before).any(axis=1).all()  # chosen or not


@pytest.mark.parametrize("sizes", [(3, 5, 7), (4, 8, 2)])
def test_fsq_gradient_is_the_derivative_of_the_bound(sizes):
    quantizer = built(FiniteScalarQuantizer(sizes))
    assert quantizer.trainable_variables == []
    tape, z, result, through = traced(quantizer)
    assert result.losses == {}
    sizes = np.float64(sizes)
    reach = (sizes - 1) * (1 + quantizer.margin) / 2
    shift = np.arctanh(np.where((sizes % 2 == 0) & (sizes > 2), 0.5, 0.0) / reach)
    slope = reach * (1 - np.tanh(Z + shift) ** 2) / (sizes // 2)
    np.testing.assert_allclose(tape.gradient(through, z), UPSTREAM * slope, rtol=1e-3, atol=1e-5)


def test_lfq_gradient_is_the_identity():
    quantizer = built(LookupFreeQuantizer(D, commitment=BETA))
    assert quantizer.trainable_variables == []
    tape, z, result, through = traced(quantizer)
    np.testing.assert_array_equal(tape.gradient(through, z), UPSTREAM)
    expected = BETA * 2 / Z.size * (Z - np.where(Z > 0, 1, -1))
    found = tape.gradient(result.losses["commitment"], z)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-8)
    assert np.abs(tape.gradient(result.losses["entropy"], z)).min() > 0


@pytest.mark.parametrize(
    "quantizer",
    [
        lambda: LookupFreeQuantizer(D, entropy=0.1),
        lambda: VectorQuantizer(K, D, entropy=0.1, update="gradient"),
    ],
    ids=["lfq", "vector"],
)
def test_entropy_reaches_only_the_encoder(quantizer):
    model = build(quantizer=quantizer())
    with tf.GradientTape(persistent=True) as tape:
        loss = model(IMAGES)["losses"]["entropy"]
    assert some_reach(tape.gradient(loss, encoder_weights(model)))
    assert none_reach(tape.gradient(loss, decoder_weights(model)))
    codebook = values(model.quantizer.trainable_variables)  # lfq has none
    assert not codebook or none_reach(tape.gradient(loss, codebook))
