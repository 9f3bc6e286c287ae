import keras
import numpy as np
import pytest
from quantizer_checks import (
    array,
    built,
    check_quantizer,
    gradient,
    latents,
    nearest_codes,
)

from vqbeam.vqvae.quantizers.predictive import PredictiveQuantizer

K, D = 9, 3


def make(**settings):
    """A layer whose predictions are something from the start."""
    layer = PredictiveQuantizer(K, D, **settings)
    for seed, convolution in enumerate(layer.predictions):
        convolution.kernel_initializer = keras.initializers.RandomNormal(stddev=0.2, seed=seed)
        convolution.bias_initializer = keras.initializers.RandomNormal(stddev=0.2, seed=seed)
    return layer


def turn_of(row, column):
    return 2 if row % 2 != column % 2 else row % 2


def guessed(prediction, grid, row, column, turn):
    """What a cell is expected to be, by its four neighbours one after another."""
    kernel, total = array(prediction.kernel)[0], np.float64(array(prediction.bias))
    offsets = {1: [(-1, -1), (-1, 1), (1, -1), (1, 1)], 2: [(-1, 0), (0, -1), (0, 1), (1, 0)]}
    for (dy, dx), matrix in zip(offsets[turn], kernel, strict=True):
        y, x = row + dy, column + dx
        if 0 <= y < grid.shape[0] and 0 <= x < grid.shape[1]:
            total = total + grid[y, x] @ np.float64(matrix)
    return total


def in_numpy(layer, z):
    """Cell by cell, in three turns, each from a grid in which the later cells are zeros."""
    codebook = np.float64(array(layer.vector.codebook))
    codes, quantized, errors = np.zeros(z.shape[:3], int), np.zeros(z.shape), np.zeros(z.shape)
    for image in range(len(z)):
        for turn in range(3):
            known = quantized[image].copy()
            for row, column in np.ndindex(z.shape[1:3]):
                if turn_of(row, column) != turn:
                    continue
                guess = 0.0
                if turn:
                    guess = guessed(layer.predictions[turn - 1], known, row, column, turn)
                left = np.float64(z[image, row, column]) - guess
                code = nearest_codes(left, codebook)
                codes[image, row, column] = code
                quantized[image, row, column] = guess + codebook[code]
                errors[image, row, column] = left - codebook[code]
    error = np.square(errors).mean()
    losses = {"commitment": layer.vector.commitment * error}
    if "codebook" in layer.loss_names:
        losses["codebook"] = error
    return codes, quantized, losses, error


@pytest.mark.backend
@pytest.mark.slow
def test_all_that_holds_for_quantizers():
    settings = {"update": "gradient", "commitment": 0.6}
    check_quantizer(lambda: make(**settings), in_numpy, shapes=((0, 2, 2), (1, 1, 1)))


def test_without_predictions_it_is_a_vector_quantizer():
    layer = built(PredictiveQuantizer(K, D))
    z = latents(2, 4, 5, D)
    result = layer(z)
    plain = layer.vector(z)
    np.testing.assert_array_equal(array(result.codes), array(plain.codes))
    np.testing.assert_allclose(array(result.quantized), array(plain.quantized), atol=1e-6)


def test_each_turn_sees_those_before_it_alone():
    layer = built(make())
    z = latents(1, 4, 4, D)
    before = array(layer(z).quantized)[0]
    for moved in range(3):
        other = z.copy()
        for row, column in np.ndindex(4, 4):
            if turn_of(row, column) == moved:
                other[0, row, column] += 5
        after = array(layer(other).quantized)[0]
        for row, column in np.ndindex(4, 4):
            if turn_of(row, column) < moved:
                np.testing.assert_array_equal(after[row, column], before[row, column])
        assert np.abs(after - before).max() > 1


@pytest.mark.backend
def test_a_training_step_predicts_by_the_codebook_before_it():
    layer = built(make(decay=0.0))
    z = latents(2, 3, 5, D)
    codes, quantized, _, _ = in_numpy(layer, z)
    result = layer(z, training=True)
    np.testing.assert_array_equal(array(result.codes), codes)
    np.testing.assert_allclose(array(result.quantized), quantized, atol=1e-5)
    # With no memory, a code is the mean of what was left for it in all turns.
    after = array(layer.vector.codebook)
    left = z - quantized + np.float64(built(make()).vector.codebook)[codes]
    for code in np.unique(codes):
        np.testing.assert_allclose(after[code], left[codes == code].mean(0), rtol=1e-3, atol=1e-4)


def test_gradient_passes_the_predictions_by():
    layer = built(make())
    z, weights = latents(1, 3, 4, D), latents(1, 3, 4, D, seed=5)
    found = gradient(lambda x: keras.ops.sum(layer(x).quantized * weights), z)
    np.testing.assert_allclose(found, weights, atol=1e-6)


@pytest.mark.parametrize(
    ("estimator", "reached"),
    [("straight_through", False), pytest.param("rotation", True, marks=pytest.mark.backend)],
)
def test_what_of_the_reconstruction_reaches_the_predictions(estimator, reached):
    layer = built(make(estimator=estimator))
    z, weights = latents(1, 3, 4, D), latents(1, 3, 4, D, seed=5)
    for prediction in layer.predictions:

        def loss(kernel, prediction=prediction):
            with keras.StatelessScope(state_mapping=[(prediction.kernel, kernel)]):
                return keras.ops.sum(layer(z).quantized * weights)

        found = gradient(loss, array(prediction.kernel))
        assert (np.abs(found).max() > 1e-3) == reached
        assert np.abs(found).max() < 1e-5 or reached


def test_diveq_takes_the_gradient_along_each_error_away():
    layer = built(make(estimator="diveq"))
    z, weights = latents(1, 3, 4, D), latents(1, 3, 4, D, seed=5)
    found = gradient(lambda x: keras.ops.sum(layer(x).quantized * weights), z)
    u = array(layer(z).quantized) - z
    u /= np.linalg.norm(u, axis=-1, keepdims=True)
    expected = weights - (weights * u).sum(-1, keepdims=True) * u
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4)


def test_refuses_a_cosine_lookup():
    with pytest.raises(ValueError, match="use 'l2'"):
        PredictiveQuantizer(K, D, lookup="cosine")
