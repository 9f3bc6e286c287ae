import numpy as np
import pytest
from keras import ops
from quantizer_checks import (
    array,
    built,
    check_quantizer,
    gradient,
    latents,
    nearest_codes,
    state,
)

from vqbeam.vqvae.quantizers.residual import ResidualQuantizer
from vqbeam.vqvae.quantizers.vector import VectorQuantizer

LEVELS, K, D = 3, 7, 4


def build(**settings):
    return built(ResidualQuantizer(LEVELS, K, D, **settings))


def codebooks(layer):
    return [np.float64(array(quantizer.codebook)) for quantizer in layer.quantizers]


def in_numpy(layer, z):
    """Each level takes the code nearest to what the levels before it have left."""
    left, codes, errors = np.float64(z), [], []
    for codebook in codebooks(layer):
        codes.append(nearest_codes(left, codebook))
        left = left - codebook[codes[-1]]
        errors.append(np.square(left).mean())
    losses = {"commitment": layer.quantizers[0].commitment * sum(errors)}
    if "codebook" in layer.loss_names:
        losses["codebook"] = sum(errors)
    return np.stack(codes, -1), z - left, losses, errors[-1]


@pytest.mark.backend
@pytest.mark.slow
def test_all_that_holds_for_quantizers():
    settings = {"update": "gradient", "commitment": 0.6, "restart_below": 0.2}
    check_quantizer(lambda: ResidualQuantizer(LEVELS, K, D, **settings), in_numpy)


@pytest.mark.parametrize(
    "estimator", ["straight_through", pytest.param("diveq", marks=pytest.mark.backend)]
)
def test_a_training_step_quantizes_by_the_codebooks_before_it(estimator):
    layer = build(decay=0.0, estimator=estimator)
    z = latents(2, 3, 5, D)
    before = codebooks(layer)
    codes, quantized, losses, error = in_numpy(layer, z)
    result = layer(z, training=True)
    np.testing.assert_array_equal(array(result.codes), codes)
    np.testing.assert_allclose(array(result.quantized), quantized, atol=1e-5)
    np.testing.assert_allclose(array(result.losses["commitment"]), losses["commitment"], rtol=1e-5)
    np.testing.assert_allclose(array(result.statistics["quantization_error"]), error, rtol=1e-5)
    # With no memory, each chosen code goes to the mean of what it was to quantize.
    left = z
    for level, (quantizer, codebook) in enumerate(zip(layer.quantizers, before, strict=True)):
        chosen = codes[..., level]
        for code in np.unique(chosen):
            mean = left[chosen == code].mean(0)
            np.testing.assert_allclose(array(quantizer.codebook)[code], mean, rtol=2e-3, atol=1e-5)
        counts = np.bincount(chosen.ravel(), minlength=K)
        np.testing.assert_array_equal(array(quantizer.usage), counts)
        left = left - codebook[chosen]


def test_one_level_is_the_plain_quantizer():
    layer, plain = (built(kind) for kind in (ResidualQuantizer(1, K, D), VectorQuantizer(K, D)))
    z = latents(2, 3, 5, D)
    for seed in range(3):
        results = [one(latents(2, 3, 5, D, seed=seed), training=True) for one in (layer, plain)]
        np.testing.assert_array_equal(array(results[0].codes)[..., 0], array(results[1].codes))
        np.testing.assert_allclose(
            array(results[0].quantized), array(results[1].quantized), atol=1e-6
        )
    for one, other in zip(state(layer), state(plain), strict=True):
        np.testing.assert_array_equal(one, other)
    assert array(layer.encode(z)).shape == (2, 3, 5, 1)


def test_more_levels_leave_less():
    layer = ResidualQuantizer(4, 16, D)
    layer.build((None, D))
    vectors = latents(200, D)
    layer.initialize(ops.convert_to_tensor(vectors), "kmeans", seed=0)
    levels = [array(q.codebook) for q in layer.quantizers]
    left, codes = vectors, array(layer.encode(vectors))
    errors = []
    for level, codebook in enumerate(levels):
        left = left - codebook[codes[:, level]]
        errors.append(np.square(left).mean())
        # Each code lies at the mean of what chooses it, so that averages and place agree.
        counts = np.bincount(codes[:, level], minlength=16)
        np.testing.assert_array_equal(array(layer.quantizers[level].ema_counts), counts)
    assert (np.diff(errors) < -0.2 * np.array(errors[:-1])).all(), errors
    np.testing.assert_allclose(array(layer.decode_codes(codes)), vectors - left, atol=1e-5)


def test_the_gradient_passes_the_sum_of_all_levels():
    layer, z, g = build(), latents(2, 3, D), latents(2, 3, D, seed=5)
    found = gradient(lambda x: ops.sum(layer(x).quantized * g), z)
    np.testing.assert_allclose(found, g, rtol=1e-6)
    # The commitment of all levels: z − each partial sum.
    left, expected = np.float64(z), 0.0
    for codebook in codebooks(layer):
        left = left - codebook[nearest_codes(left, codebook)]
        expected = expected + 2 * 0.25 * left / z.size
    found = gradient(lambda x: layer(x).losses["commitment"], z)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)


def test_refuses_angles():
    with pytest.raises(ValueError, match="lookup is 'cosine', but .*; use 'l2'"):
        ResidualQuantizer(2, K, D, lookup="cosine")
