import keras
import numpy as np
import pytest
from keras import layers

from vqbeam.vqvae.resnet import NormalizedBlock, build_decoder, build_encoder


def array(tensor):
    return np.asarray(tensor).copy()


def settings(**changes):
    defaults = dict(latent_channels=5, downsampling=4, width=8, residual_layers=1, dtype="float32")
    return defaults | changes


@pytest.mark.slow
@pytest.mark.parametrize(
    ("downsampling", "image_shape"), [(2, (16, 48, 1)), (16, (32, 32, 3))], ids=["least", "most"]
)
def test_shapes(downsampling, image_shape):
    arguments = settings(downsampling=downsampling)
    encoder = build_encoder(image_shape, **arguments)
    decoder = build_decoder(image_shape, **arguments)
    grid = (image_shape[0] // downsampling, image_shape[1] // downsampling)
    assert encoder.output_shape == decoder.input_shape == (None, *grid, 5)
    assert decoder.output_shape == (None, *image_shape)


@pytest.mark.slow
def test_sides_that_are_no_powers_of_two():
    encoder, decoder = (
        build((28, 20, 1), **settings()) for build in (build_encoder, build_decoder)
    )
    latents = encoder(np.zeros((2, 28, 20, 1), "float32"))
    assert latents.shape == (2, 7, 5, 5)
    assert decoder(latents).shape == (2, 28, 20, 1)


@pytest.mark.slow
@pytest.mark.parametrize("count", [0, 2])
def test_channels_and_blocks_at_each_resolution(count):
    def blocks(build):
        model = build((32, 32, 3), **settings(downsampling=8, residual_layers=count))
        found = [layer for layer in model.layers if isinstance(layer, NormalizedBlock)]
        return [(block.output.shape[1], block.width) for block in found]

    upper = [(32, 8), (16, 16), (8, 32)]
    assert blocks(build_encoder) == [r for r in upper for _ in range(count)] + [(4, 32)] * (
        count + 2
    )
    assert blocks(build_decoder) == [(4, 32)] * (count + 3) + [
        r for r in reversed(upper) for _ in range(count + 1)
    ]


def group_norm(norm, x):
    batch, height, width, channels = x.shape
    grouped = x.reshape(batch, height * width, norm.groups, channels // norm.groups)
    mean = grouped.mean((1, 3), keepdims=True)
    variance = grouped.var((1, 3), keepdims=True)
    scaled = ((grouped - mean) / np.sqrt(variance + 1e-6)).reshape(x.shape)
    return scaled * array(norm.gamma) + array(norm.beta)


def conv3x3(conv, x):
    kernel, (_, height, width, _) = array(conv.kernel), x.shape
    padded = np.pad(x, [(0, 0), (1, 1), (1, 1), (0, 0)])
    shifted = (
        padded[:, i : i + height, j : j + width] @ kernel[i, j] for i in range(3) for j in range(3)
    )
    return sum(shifted) + array(conv.bias)


# With and without a change of the channels.
@pytest.mark.parametrize("width", [4, pytest.param(8, marks=pytest.mark.backend)])
def test_block_in_numpy(width):
    keras.utils.set_random_seed(0)
    block = NormalizedBlock(width, groups=2)
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, 5, 6, 4)).astype("float32")
    block.build(x.shape)
    for weight in block.weights:  # biases and scales other than 0 and 1
        weight.assign(weight + rng.normal(size=weight.shape) * 0.3)
    h = x
    for norm, conv in zip(block.norms, block.convs, strict=True):
        h = group_norm(norm, h)
        h = conv3x3(conv, h / (1 + np.exp(-h)))
    if width == 4:
        assert not block.shortcut.weights
        shortcut = x
    else:
        shortcut = x @ array(block.shortcut.kernel)[0, 0] + array(block.shortcut.bias)
    np.testing.assert_allclose(array(block(x)), shortcut + h, atol=1e-5)


def test_block_round_trip():
    block = NormalizedBlock(4, 2, dtype="mixed_bfloat16")
    twin = keras.saving.deserialize_keras_object(keras.saving.serialize_keras_object(block))
    assert isinstance(twin, NormalizedBlock) and twin.get_config() == block.get_config()
    assert {conv.compute_dtype for conv in twin.convs} == {"bfloat16"}


@pytest.mark.slow
def test_groups_divide_all_channels():
    for width, groups in {12: 4, 64: 32, 5: 1}.items():
        model = build_encoder((8, 8, 3), **settings(width=width, residual_layers=0))
        found = [layer for layer in model.layers if isinstance(layer, NormalizedBlock)]
        assert {block.groups for block in found} == {groups}


@pytest.mark.slow
def test_a_mixed_policy_reaches_every_layer():
    encoder, decoder = (
        build((8, 8, 3), **settings(dtype="mixed_bfloat16"))
        for build in (build_encoder, build_decoder)
    )
    for model in (encoder, decoder):
        found = list(model._flatten_layers(include_self=False))
        kinds = (layers.Conv2D, layers.GroupNormalization, layers.UpSampling2D)
        found = [layer for layer in found if isinstance(layer, kinds)]
        assert len(found) > 10
        assert {layer.compute_dtype for layer in found} == {"bfloat16"}
        assert {layer.variable_dtype for layer in found} == {"float32"}
    latents = encoder(np.zeros((1, 8, 8, 3), "float32"))
    assert keras.backend.standardize_dtype(decoder(latents).dtype) == "float32"


def test_the_decoder_has_no_period_of_two():
    # A strided transposed convolution maps constant latents to a pattern of dots.
    keras.utils.set_random_seed(0)
    decoder = build_decoder((96, 96, 1), **settings(residual_layers=0))
    image = array(decoder(np.ones((1, 24, 24, 5), "float32")))[0]
    assert np.ptp(image[:8]) > 0.01  # the padding is seen near the border
    np.testing.assert_allclose(image[46:50, 46:50], image[46, 46, 0], rtol=1e-4)
