import numpy as np
import pytest
from keras import ops
from quantizer_checks import array, check_quantizer, gradient, latents

from vqbeam.vqvae.quantizers.lfq import LookupFreeQuantizer


def corners(bits):
    """All codes as vectors: the lowest bit of a code is its first channel."""
    return np.array([[1 if code >> i & 1 else -1 for i in range(bits)] for code in range(2**bits)])


def entropies(z):
    """E[H(p)] and H(E[p]) by all corners: p falls with the squared distance to each."""
    z = np.float64(z).reshape(-1, z.shape[-1])
    scores = -np.square(z[:, None] - corners(z.shape[-1])).sum(-1)
    p = np.exp(scores - scores.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)

    def entropy(p):
        return -np.sum(p * np.log(np.maximum(p, 1e-300)), axis=-1)

    return entropy(p).mean(), entropy(p.mean(0))


def in_numpy(layer, z):
    signs = np.where(z > 0, 1.0, -1.0)
    codes = ((z > 0) * 2 ** np.arange(layer.dim)).sum(-1)
    error = np.square(z - signs).mean()
    losses = {"commitment": layer.commitment * error}
    if layer.entropy:
        of_each, of_mean = entropies(z)
        losses["entropy"] = layer.entropy * (of_each - of_mean)
    return codes, signs, losses, error


@pytest.mark.parametrize(
    "arguments",
    [pytest.param((5,), marks=pytest.mark.backend), (4, 0.6, 0.0)],
    ids=["with entropy", "without entropy"],
)
def test_all_that_holds_for_quantizers(arguments):
    check_quantizer(lambda: LookupFreeQuantizer(*arguments), in_numpy)


@pytest.mark.parametrize(("bits", "scale"), [(1, 1.0), (9, 0.1), (9, 20.0)])
def test_entropy_is_exact_up_to_512_codes(bits, scale):
    layer = LookupFreeQuantizer(bits, entropy=1.0)
    z = scale * latents(6, 5, bits)
    of_each, of_mean = entropies(z)
    found = array(layer(z).losses["entropy"])
    np.testing.assert_allclose(found, of_each - of_mean, rtol=1e-4, atol=1e-5)


@pytest.mark.backend
def test_entropy_of_more_codes_takes_the_channels_in_groups():
    layer = LookupFreeQuantizer(11, entropy=1.0)
    z = 0.5 * latents(6, 5, 11)
    first, second = entropies(z[..., :9]), entropies(z[..., 9:])
    expected = first[0] + second[0] - first[1] - second[1]
    np.testing.assert_allclose(array(layer(z).losses["entropy"]), expected, rtol=1e-4)
    # Which is no more than the whole one: the entropy of parts bounds that of all.
    of_each, of_mean = entropies(z)
    assert expected < of_each - of_mean


def test_every_code_is_a_corner_of_its_own():
    layer = LookupFreeQuantizer(6)
    assert layer.num_codes == 64
    every = np.arange(64, dtype="int32")
    points = array(layer.decode_codes(every))
    np.testing.assert_array_equal(points, corners(6))
    np.testing.assert_array_equal(array(layer.encode(0.01 * points)), every)


def test_the_largest_codes_fit_an_int32():
    layer = LookupFreeQuantizer(30)
    z = np.ones((1, 30), "float32")
    assert array(layer.encode(z)) == [2**30 - 1]
    np.testing.assert_array_equal(array(layer.decode_codes(layer.encode(z))), z)


@pytest.mark.backend
def test_gradients():
    layer = LookupFreeQuantizer(4, commitment=0.6, entropy=0.0)
    z, g = latents(6, 4), latents(6, 4, seed=1)
    found = gradient(lambda x: ops.sum(layer(x).quantized * g), z)
    np.testing.assert_allclose(found, g, rtol=1e-6)
    found = gradient(lambda x: layer(x).losses["commitment"], z)
    np.testing.assert_allclose(found, 0.6 * 2 * (z - np.sign(z)) / z.size, rtol=1e-5, atol=1e-7)


def test_the_entropy_loss_spreads_what_lies_together():
    layer = LookupFreeQuantizer(3, entropy=1.0)
    z = (0.5 + 0.3 * latents(50, 3)).astype("float32")
    for _ in range(60):
        z = z - 5.0 * gradient(lambda x: layer(x).losses["entropy"], z)
    found = np.bincount(array(layer.encode(z)), minlength=8)
    assert found.min() > 0
    # The least that there is: every vector is sure, and all 8 codes are used alike.
    assert array(layer(z).losses["entropy"]) < -0.8 * np.log(8)


@pytest.mark.parametrize("bits", [0, 31])
def test_refuses_other_numbers_of_bits(bits):
    with pytest.raises(ValueError, match=f"num_bits is {bits}; it must be from 1 to 30"):
        LookupFreeQuantizer(bits)
