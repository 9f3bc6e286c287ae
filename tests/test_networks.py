import keras
import numpy as np
import pytest
from keras import layers, ops

from vqbeam.vqvae.networks import (
    ResidualBlock,
    build_coarser,
    build_decoder,
    build_encoder,
    build_finer,
    build_projection,
)


def array(tensor):
    return np.asarray(tensor).copy()


def settings(**changes):
    defaults = dict(
        latent_channels=5,
        downsampling=4,
        width=8,
        residual_layers=2,
        residual_width=3,
        dtype="float32",
    )
    return defaults | changes


def convolutions(model):
    return [layer for layer in model.layers if isinstance(layer, layers.Conv2D)]


@pytest.mark.parametrize(
    ("downsampling", "image_shape"), [(2, (16, 48, 1)), (16, (32, 32, 3))], ids=["least", "most"]
)
def test_shapes(downsampling, image_shape):
    arguments = settings(downsampling=downsampling)
    encoder = build_encoder(image_shape, **arguments)
    decoder = build_decoder(image_shape, **arguments)
    grid = (image_shape[0] // downsampling, image_shape[1] // downsampling)
    assert encoder.input_shape == (None, *image_shape)
    assert encoder.output_shape == decoder.input_shape == (None, *grid, 5)
    assert decoder.output_shape == (None, *image_shape)


def test_decoder_takes_what_the_encoder_gives():
    encoder, decoder = (build((8, 16, 1), **settings()) for build in (build_encoder, build_decoder))
    latents = encoder(np.zeros((2, 8, 16, 1), "float32"))
    assert latents.shape == (2, 2, 4, 5)
    assert decoder(latents).shape == (2, 8, 16, 1)


@pytest.mark.parametrize(("downsampling", "doublings"), [(2, 1), (8, 3)])
def test_one_strided_convolution_for_each_doubling(downsampling, doublings):
    encoder = build_encoder((16, 16, 3), **settings(downsampling=downsampling))
    decoder = build_decoder((16, 16, 3), **settings(downsampling=downsampling))
    down = [layer.filters for layer in convolutions(encoder) if layer.strides == (2, 2)]
    assert down == [4] * (doublings - 1) + [8]
    up = [layer.filters for layer in decoder.layers if isinstance(layer, layers.Conv2DTranspose)]
    assert up == [4] * (doublings - 1) + [3]


@pytest.mark.parametrize("blocks", [0, 3])
def test_residual_blocks(blocks):
    for build in (build_encoder, build_decoder):
        model = build((8, 8, 1), **settings(residual_layers=blocks))
        found = [layer for layer in model.layers if isinstance(layer, ResidualBlock)]
        assert [(block.width, block.hidden) for block in found] == [(8, 3)] * blocks


def test_a_mixed_policy_reaches_every_convolution():
    policy, compute = "mixed_bfloat16", "bfloat16"
    encoder = build_encoder((8, 8, 1), **settings(dtype=policy))
    decoder = build_decoder((8, 8, 1), **settings(dtype=policy))
    for model in (encoder, decoder):
        found = list(model._flatten_layers(include_self=False))
        found = [layer for layer in found if "conv" in layer.name]
        # Those in the residual blocks among them.
        assert len(found) >= 2 * 2 + 3
        assert {layer.compute_dtype for layer in found} == {compute}
        assert {layer.variable_dtype for layer in found} == {"float32"}
    latents = encoder(np.zeros((1, 8, 8, 1), "float32"))
    assert keras.backend.standardize_dtype(latents.dtype) == compute
    assert keras.backend.standardize_dtype(decoder(latents).dtype) == "float32"


@pytest.mark.backend
def test_arithmetic_of_a_mixed_policy_is_that_of_half_precision():
    keras.utils.set_random_seed(0)
    encoder = build_encoder((8, 8, 1), **settings(dtype="mixed_bfloat16"))
    full = build_encoder((8, 8, 1), **settings())
    full.set_weights(encoder.get_weights())
    images = np.random.default_rng(0).uniform(-1, 1, (2, 8, 8, 1)).astype("float32")
    exact = array(full(images))
    rounded = array(ops.cast(encoder(images), "float32"))
    error = np.abs(rounded - exact).max() / np.abs(exact).max()
    assert 1e-4 < error < 0.05


@pytest.mark.backend
def test_residual_block_in_numpy():
    keras.utils.set_random_seed(0)
    block = ResidualBlock(4, 3)
    x = np.random.default_rng(0).normal(size=(2, 5, 6, 4)).astype("float32")
    result = array(block(x))
    kernel = array(block.conv_in.kernel)
    padded = np.pad(np.maximum(x, 0), [(0, 0), (1, 1), (1, 1), (0, 0)])
    h = sum(padded[:, i : i + 5, j : j + 6] @ kernel[i, j] for i in range(3) for j in range(3))
    out = np.maximum(h, 0) @ array(block.conv_out.kernel)[0, 0]
    np.testing.assert_allclose(result, x + out, atol=1e-5)
    assert len(block.weights) == 2  # no biases


def test_residual_block_round_trip():
    block = ResidualBlock(4, 3, dtype="mixed_bfloat16")
    twin = keras.saving.deserialize_keras_object(keras.saving.serialize_keras_object(block))
    assert isinstance(twin, ResidualBlock) and twin.get_config() == block.get_config()
    assert twin.conv_in.compute_dtype == twin.conv_out.compute_dtype == "bfloat16"


def test_networks_between_two_grids():
    policy = "mixed_bfloat16"
    blocks = dict(residual_layers=2, residual_width=3, dtype=policy)
    coarser = build_coarser((4, 6, 8), 5, 8, **blocks)
    finer = build_finer((2, 3, 5), 5, 8, **blocks)
    assert coarser.output_shape == finer.input_shape == (None, 2, 3, 5)
    assert finer.output_shape == (None, 4, 6, 5)
    for model in (coarser, finer):
        found = [layer for layer in model.layers if isinstance(layer, ResidualBlock)]
        assert [(block.width, block.hidden) for block in found] == [(8, 3)] * 2
        found = [x for x in model._flatten_layers(include_self=False) if "conv" in x.name]
        assert {layer.dtype_policy.name for layer in found} == {policy}


def test_projection_in_numpy():
    projection = build_projection((2, 3, 7), 4, dtype="float32")
    x = np.random.default_rng(0).normal(size=(5, 2, 3, 7)).astype("float32")
    kernel, bias = (array(weight) for weight in projection.weights)
    assert kernel.shape == (1, 1, 7, 4)
    np.testing.assert_allclose(array(projection(x)), x @ kernel[0, 0] + bias, atol=1e-5)
