import numpy as np
import pytest
from keras import ops
from quantizer_checks import array, check_quantizer, gradient, latents

from vqbeam.vqvae.quantizers.fsq import FiniteScalarQuantizer


def constants(sizes):
    """Reach, offset, shift and half of appendix A.1 of Mentzer et al. 2023; no shift of 2."""
    sizes = np.float64(sizes)
    reach = (sizes - 1) * (1 + 1e-3) / 2
    offset = np.where(sizes % 2 == 0, 0.5, 0.0)
    return reach, offset, np.arctanh(np.where(sizes == 2, 0, offset) / reach), sizes // 2


def in_numpy(layer, z):
    sizes = layer.levels_per_channel
    reach, offset, shift, half = constants(sizes)
    bounded = reach * np.tanh(z + shift) - offset
    rounded = np.round(bounded)
    digits = (rounded + half).astype(int)
    codes = sum(digits[..., i] * int(np.prod(sizes[:i])) for i in range(len(sizes)))
    return codes, rounded / half, {}, np.square((bounded - rounded) / half).mean()


@pytest.mark.backend
def test_all_that_holds_for_quantizers():
    check_quantizer(lambda: FiniteScalarQuantizer((8, 5, 2)), in_numpy, scale=2.0)


@pytest.mark.parametrize(
    "sizes", [(2,), (3,), pytest.param((2, 3, 4), marks=pytest.mark.backend), (64, 63, 2)]
)
def test_every_code_stands_for_a_point_of_its_own_that_is_quantized_to_it(sizes):
    layer = FiniteScalarQuantizer(sizes)
    assert layer.num_codes == np.prod(sizes) and layer.dim == len(sizes)
    every = np.arange(layer.num_codes, dtype="int32")
    points = array(layer.decode_codes(every))
    assert len(np.unique(points, axis=0)) == layer.num_codes
    assert points.min() == -1 and np.abs(points).max() <= 1
    for channel, size in enumerate(sizes):
        values = (np.arange(size) - size // 2) / (size // 2)
        np.testing.assert_allclose(np.unique(points[:, channel]), values, atol=1e-7)
    # The latents whose bounded values are the points exactly: the inverse of the tanh.
    reach, offset, shift, half = constants(sizes)
    z = (np.arctanh((points * half + offset) / reach) - shift).astype("float32")
    np.testing.assert_array_equal(array(layer.encode(z)), every)
    np.testing.assert_allclose(array(layer(z).quantized), points, atol=1e-6)


@pytest.mark.parametrize("sizes", [(2, 2), (3, 5), (255, 256), (1023, 1024)])
def test_the_outermost_values_are_reached_and_not_passed(sizes):
    layer = FiniteScalarQuantizer(sizes)
    for far, codes in [(-1e4, 0), (1e4, layer.num_codes - 1)]:
        z = np.full((1, 2), far, "float32")
        assert array(layer.encode(z))[0] == codes
        assert array(layer(z).codes)[0] == codes
    found = array(layer.encode(3 * latents(4000, 2)))
    assert found.min() >= 0 and found.max() < layer.num_codes


def test_zero_is_a_value_of_its_own():
    layer = FiniteScalarQuantizer((8, 5))
    np.testing.assert_allclose(array(layer(np.zeros((1, 2), "float32")).quantized), 0, atol=1e-6)


@pytest.mark.backend
def test_the_gradient_is_that_of_the_bound():
    sizes = (8, 5, 2)
    layer, z, g = FiniteScalarQuantizer(sizes), latents(6, 3), latents(6, 3, seed=1)
    reach, _, shift, half = constants(sizes)
    expected = g * (1 - np.tanh(z + shift) ** 2) * reach / half
    found = gradient(lambda x: ops.sum(layer(x).quantized * g), z)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)


def test_channels_of_two_values_are_signs_that_can_be_learned():
    layer, z = FiniteScalarQuantizer((2, 2, 2)), latents(4000, 3)
    codes = array(layer.encode(z))
    np.testing.assert_array_equal(codes, (z > 0) @ [1, 2, 4])
    assert np.bincount(codes, minlength=8).min() > 300
    slope = gradient(lambda x: ops.sum(layer(x).quantized), z)
    assert np.median(slope) > 0.3


def test_has_no_weights():
    layer = FiniteScalarQuantizer((4, 3))
    layer(np.zeros((1, 2), "float32"), training=True)
    assert layer.weights == [] and layer.loss_names == ()


@pytest.mark.parametrize("sizes", [(), (8, 1), (0,)])
def test_refuses_channels_of_one_value(sizes):
    with pytest.raises(ValueError, match="each must be at least 2"):
        FiniteScalarQuantizer(sizes)
