"""Checks that every quantizer must pass; the tests of each quantizer call `check_quantizer`."""

import keras
import numpy as np
import pytest
from keras import ops

from vqbeam.vqvae.model import VQVAE

SHAPE = (2, 3, 5)


def array(tensor):
    return np.asarray(tensor).copy()


def numbers(seed):
    return np.random.default_rng(seed)


def latents(*shape, seed=0):
    return numbers(seed).normal(size=shape).astype("float32")


def state(layer):
    return [array(weight) for weight in layer.weights]


def assert_same_state(one, other):
    assert len(one) == len(other)
    for a, b in zip(one, other, strict=True):
        np.testing.assert_array_equal(a, b)


def built(layer, seed=1):
    """Builds a layer outside of any model, its codebooks normal numbers."""
    layer.build((None, None, None, layer.dim))
    for index, weight in enumerate(w for w in layer.weights if w.name == "codebook"):
        weight.assign(latents(*weight.shape, seed=seed + index))
    return layer


def nearest_codes(z, codebook):
    """The assignment by the definition of a distance, in float64."""
    z, codebook = np.float64(z), np.float64(codebook)
    return np.square(z[..., None, :] - codebook).sum(-1).argmin(-1)


def gradient(function, x):
    """The gradient of a scalar function of one array, on either backend."""
    if keras.backend.backend() == "jax":
        import jax

        return array(jax.grad(function)(ops.convert_to_tensor(x)))
    import tensorflow as tf

    x = tf.convert_to_tensor(x)
    with tf.GradientTape() as tape:
        tape.watch(x)
        value = function(x)
    return array(tape.gradient(value, x, unconnected_gradients="zero"))


def check_quantizer(make, in_numpy, *, scale=1.0, shapes=((0, 3), (0, 2, 2), (1, 1))):
    """Runs all checks on one quantizer.

    Args:
        make: Returns a new layer, not built.
        in_numpy: Function of a built layer and z [..., D] that returns codes, quantized, the
            losses by name and the error, all recomputed from the layer's weights.
        scale: Of the latents that the layer is given.
        shapes: Of latents, without their channels, that are empty or as small as can be.
    """

    def latents_of(layer, seed=0):
        return scale * latents(*SHAPE, layer.dim, seed=seed)

    layer = built(make())
    _check_values(layer, in_numpy, latents_of(layer))
    _check_evaluation_moves_nothing(layer, latents_of)
    _check_float32(make, latents_of)
    _check_serialization(layer, latents_of)
    _check_shapes(make, shapes)
    _check_fit_step(make, in_numpy)


def _check_values(layer, in_numpy, z):
    codes, quantized, losses, error = in_numpy(layer, z)
    result = layer(z)
    found = array(result.codes)
    shape = (*z.shape[:-1], layer.levels) if layer.levels > 1 else z.shape[:-1]
    assert found.dtype == np.int32 and found.shape == shape
    assert found.min() >= 0 and found.max() < layer.num_codes
    assert len(np.unique(found)) > 2  # or there is little to see
    np.testing.assert_array_equal(found, codes)
    np.testing.assert_array_equal(array(layer.encode(z)), found)
    np.testing.assert_allclose(array(result.quantized), quantized, rtol=1e-5, atol=1e-5)
    decoded = array(layer.decode_codes(result.codes))
    assert decoded.dtype == np.float32
    np.testing.assert_allclose(decoded, quantized, rtol=1e-5, atol=1e-5)
    assert set(result.losses) == set(losses) == set(layer.loss_names)
    for name, value in losses.items():
        np.testing.assert_allclose(array(result.losses[name]), value, rtol=1e-4, err_msg=name)
    assert set(result.statistics) == {"quantization_error"}
    np.testing.assert_allclose(array(result.statistics["quantization_error"]), error, rtol=1e-4)


def _check_evaluation_moves_nothing(layer, latents_of):
    layer(latents_of(layer), training=True)
    before = state(layer)
    for arguments in ({}, {"training": False}):
        codes = layer(latents_of(layer, seed=1), **arguments).codes
        layer.encode(latents_of(layer, seed=2))
        layer.decode_codes(codes)
    layer.trainable = False  # as a user freezes it
    layer(latents_of(layer, seed=3), training=True)
    layer.trainable = True
    assert_same_state(before, state(layer))


def _check_float32(make, latents_of):
    keras.config.set_dtype_policy("mixed_bfloat16")
    try:
        layer = built(make())
    finally:
        keras.config.set_dtype_policy("float32")
    assert layer.compute_dtype == "float32"
    assert {weight.dtype for weight in layer.weights} <= {"float32"}
    full = built(make())
    for dtype in ("bfloat16", "float16"):
        half = ops.cast(latents_of(layer, seed=3), dtype)
        for copy in (layer, full):
            copy.set_weights(built(make()).get_weights())
        result = layer(half, training=True)
        expected = full(ops.cast(half, "float32"), training=True)
        for a, b in zip(_leaves(result), _leaves(expected), strict=True):
            assert a.dtype in (np.float32, np.int32)
            np.testing.assert_array_equal(a, b)
        np.testing.assert_array_equal(array(layer.encode(half)), array(full.encode(half)))
        assert_same_state(state(layer), state(full))


def _leaves(result):
    scalars = {**result.losses, **result.statistics}
    return [array(x) for x in (result.quantized, result.codes, *scalars.values())]


def _check_serialization(layer, latents_of):
    twin = keras.saving.deserialize_keras_object(keras.saving.serialize_keras_object(layer))
    assert type(twin) is type(layer) and twin.get_config() == layer.get_config()
    assert twin.loss_names == layer.loss_names and twin.levels == layer.levels
    twin.set_weights(layer.get_weights())
    for copy in (layer, twin):  # as training does before each epoch
        for variable in copy.variables:
            if "seed_generator" in variable.path:
                variable.assign(np.array([1, 2], "uint32").astype(variable.dtype))
    for seed in range(3):  # both go on alike
        z = latents_of(layer, seed=seed)
        results = [copy(z, training=True) for copy in (layer, twin)]
        for a, b in zip(_leaves(results[0]), _leaves(results[1]), strict=True):
            np.testing.assert_array_equal(a, b)
    assert_same_state(state(layer), state(twin))


def _check_shapes(make, shapes):
    dim = make().dim
    with pytest.raises(ValueError, match=f"takes {dim} channels, its input has {dim + 1}; "):
        make()(np.zeros((1, 2, 2, dim + 1), "float32"))
    layer = built(make())
    before = state(layer)
    for shape in shapes:
        result = layer(np.ones((*shape, dim), "float32"))
        levels = (layer.levels,) if layer.levels > 1 else ()
        assert tuple(result.codes.shape) == (*shape, *levels)
        assert tuple(result.quantized.shape) == (*shape, dim)
        assert tuple(layer.decode_codes(result.codes).shape) == (*shape, dim)
    assert_same_state(before, state(layer))


def _check_fit_step(make, in_numpy):
    keras.utils.set_random_seed(0)
    model = VQVAE(
        image_shape=(8, 8, 1),
        quantizer=make(),
        downsampling=4,
        width=4,
        residual_layers=0,
        residual_width=2,
        data_variance=0.5,
    )
    # Latents far enough from 0 for several codes of any family.
    kernel = model.encoder.trainable_variables[-2]
    kernel.assign(10 * kernel)
    images = numbers(0).uniform(-1, 1, (4, 8, 8, 1)).astype("float32")
    codes, quantized, losses, error = in_numpy(model.quantizer, array(model.encoder(images)))
    decoded = array(model.decoder(np.float32(quantized)))
    expected = {"reconstruction": np.square(images - decoded).mean() / 0.5, **losses}
    expected["loss"] = sum(expected.values())
    expected["quantization_error"] = error
    kernels = [model.encoder.trainable_variables[0], model.decoder.trainable_variables[0]]
    before = [array(kernel) for kernel in kernels]
    model.compile(keras.optimizers.SGD(0.03))
    history = model.fit(images, batch_size=4, epochs=2, shuffle=False, verbose=0).history
    for name, value in expected.items():
        np.testing.assert_allclose(history[name][0], value, rtol=1e-3, err_msg=name)
    assert set(history) >= set(expected) | {"perplexity", "codes_used"}
    used = len(np.unique(codes)) / model.quantizer.num_codes
    if model.quantizer.levels == 1:
        np.testing.assert_allclose(history["codes_used"][0], used, rtol=1e-5)
    for old, kernel in zip(before, kernels, strict=True):
        assert np.abs(array(kernel) - old).max() > 0
    # The second step is taken from other weights; signs that flip may make it a worse one.
    assert np.isfinite(history["loss"]).all() and history["loss"][1] != history["loss"][0]
