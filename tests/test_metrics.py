import math

import keras
import numpy as np
import pytest
from keras import ops

from vqbeam.vqvae.layout import CodeLayout
from vqbeam.vqvae.metrics import (
    CodebookUsage,
    bits_per_image,
    compression_ratio,
    count_codes,
    nmse,
    perplexity,
    psnr,
    ssim,
)


def numbers(result):
    return {name: float(ops.convert_to_numpy(value)) for name, value in result.items()}


def entropy_perplexity(counts):
    share = np.array(counts) / np.sum(counts)
    share = share[share > 0]
    return np.exp(-np.sum(share * np.log(share)))


@pytest.mark.backend
def test_each_level_is_counted_by_itself():
    codes = np.array([[[[0, 2], [0, 1]]], [[[2, 2], [0, 2]]]], "uint16")  # [2, 1, 2, 2]
    counts = count_codes(codes, CodeLayout(3, ((1, 2),), depth=2))
    np.testing.assert_array_equal(counts, [[3, 0, 1], [0, 1, 3]])


@pytest.mark.backend
def test_codebook_use_counts_over_batches():
    metric = CodebookUsage(CodeLayout(6, ((1, 2),)))
    for batch in ([[[0, 1]], [[1, 2]]], [[[1, 5]]], [[[0, 0]], [[0, 1]]]):
        metric.update_state(np.array(batch, "int32"))
    result = numbers(metric.result())
    assert set(result) == {"perplexity", "codes_used"}
    assert result["perplexity"] == pytest.approx(entropy_perplexity([4, 4, 1, 1]), rel=1e-5)
    assert result["codes_used"] == pytest.approx(4 / 6)
    metric.reset_state()
    metric.update_state(np.array([[[3, 3]]], "int32"))
    assert numbers(metric.result()) == pytest.approx({"perplexity": 1, "codes_used": 1 / 6})


def test_codebook_use_at_its_bounds():
    metric = CodebookUsage(CodeLayout(8, ((2, 2),)))
    metric.update_state(np.arange(8, dtype="int32").reshape(2, 2, 2))
    assert numbers(metric.result()) == pytest.approx({"perplexity": 8, "codes_used": 1}, rel=1e-5)
    nothing = numbers(CodebookUsage(CodeLayout(8, ((2, 2),))).result())
    assert nothing["codes_used"] == 0 and np.isfinite(nothing["perplexity"])


@pytest.mark.parametrize(
    "layout",
    [CodeLayout(5, ((2, 3),), depth=3), CodeLayout(5, ((1, 2), (2, 4)))],
    ids=["residual", "two grids"],
)
def test_codebook_use_of_each_level(layout):
    random = np.random.default_rng(0)
    # The levels use different shares of their codebooks.
    tops = np.array([2, 4, 5])[layout.level].reshape(layout.shape)
    batches = [(random.random((count, *layout.shape)) * tops).astype("int32") for count in (2, 3)]
    metric = CodebookUsage(layout)
    for batch in batches:
        metric.update_state(batch)
    codes = np.concatenate(batches).reshape(5, -1)
    result = numbers(metric.result())
    counts = [
        np.bincount(codes[:, layout.level == level].ravel(), minlength=5)
        for level in range(layout.levels)
    ]
    np.testing.assert_array_equal(ops.convert_to_numpy(metric.counts), counts)
    for level, of_level in enumerate(counts):
        assert result[f"perplexity_{level}"] == pytest.approx(entropy_perplexity(of_level), 1e-5)
        assert result[f"codes_used_{level}"] == pytest.approx((of_level > 0).mean())
    for name in ("perplexity", "codes_used"):
        levels = [result[f"{name}_{level}"] for level in range(layout.levels)]
        assert len(set(levels)) == layout.levels
        assert result[name] == pytest.approx(np.mean(levels), rel=1e-5)
    assert len(result) == 2 + 2 * layout.levels


@pytest.mark.parametrize(
    "layout", [CodeLayout(8, ((2, 2),), depth=4), CodeLayout(8, ((1, 1), (2, 2)))]
)
def test_codebook_use_round_trip(layout):
    metric = CodebookUsage(layout, name="use")
    twin = keras.saving.deserialize_keras_object(keras.saving.serialize_keras_object(metric))
    assert (twin.layout, twin.name) == (layout, "use")


def test_perplexity():
    assert perplexity(np.array([0, 5, 0])) == pytest.approx(1)
    assert perplexity(np.full(7, 3)) == pytest.approx(7)
    # Entropy of 1/2, 1/4, 1/4 is 1.5 bits.
    assert perplexity(np.array([2, 0, 1, 1])) == pytest.approx(2**1.5)


def test_perplexity_agrees_with_the_metric():
    codes = np.random.default_rng(0).integers(0, 20, 300) ** 2 // 20
    metric = CodebookUsage(CodeLayout(25, ((10, 10),)))
    metric.update_state(codes.reshape(3, 10, 10).astype("int32"))
    expected = perplexity(np.bincount(codes, minlength=25))
    assert numbers(metric.result())["perplexity"] == pytest.approx(expected, rel=1e-5)


def test_psnr():
    assert psnr(255.0**2) == pytest.approx(0)
    assert psnr(255.0**2 / 1000) == pytest.approx(30)
    assert psnr(1.0) == pytest.approx(48.1308, abs=1e-4)
    assert psnr(0.0) == math.inf


def test_nmse_is_the_share_of_the_variance_that_is_lost():
    pixels = np.random.default_rng(0).normal(3, 5, 1000)
    assert nmse(np.square(pixels - pixels.mean()).mean(), pixels.var()) == pytest.approx(1)
    assert nmse(5.0, 20.0) == 0.25


def gaussian_window(size):
    squares = (np.arange(size) - (size - 1) / 2) ** 2
    line = np.exp(-squares / (2 * 1.5**2))
    return np.outer(line, line) / line.sum() ** 2


def ssim_of_channel(x, y, size):
    """Equation 13 of Wang et al. 2004 in float64, place by place."""
    window, c1, c2 = gaussian_window(size), (0.01 * 255) ** 2, (0.03 * 255) ** 2
    found = []
    for top, left in np.ndindex(x.shape[0] - size + 1, x.shape[1] - size + 1):
        a, b = (z[top : top + size, left : left + size].astype("float64") for z in (x, y))
        mean_a, mean_b = (window * a).sum(), (window * b).sum()
        variances = (window * (a - mean_a) ** 2).sum() + (window * (b - mean_b) ** 2).sum()
        covariance = (window * (a - mean_a) * (b - mean_b)).sum()
        found.append(
            (2 * mean_a * mean_b + c1)
            * (2 * covariance + c2)
            / ((mean_a**2 + mean_b**2 + c1) * (variances + c2))
        )
    return np.mean(found)


@pytest.mark.parametrize(
    ("shape", "size"),
    [
        ((28, 28, 1), 11),
        pytest.param((16, 14, 3), 11, marks=pytest.mark.backend),
        ((8, 8, 1), 7),
        ((12, 5, 1), 5),
    ],
)
def test_ssim_in_numpy(shape, size):
    numbers = np.random.default_rng(0)
    originals = numbers.integers(0, 256, (2, *shape), np.uint8)
    noise = numbers.integers(0, 40, originals.shape, np.uint8)
    copies = (originals // 2 + noise).astype(np.uint8)
    found = ssim(originals, copies)
    assert found.shape == (2,) and found.dtype == np.float32
    expected = [
        np.mean([ssim_of_channel(x[..., c], y[..., c], size) for c in range(shape[-1])])
        for x, y in zip(originals, copies, strict=True)
    ]
    np.testing.assert_allclose(found, expected, rtol=1e-4)
    np.testing.assert_allclose(ssim(originals, originals), 1, rtol=1e-6)


def test_bits_and_compression():
    assert bits_per_image(49, 256) == 392
    assert bits_per_image(10, 1000) == pytest.approx(99.6578, abs=1e-4)
    assert compression_ratio((28, 28, 1), 392) == 16
    assert compression_ratio((32, 32, 3), 576) == pytest.approx(42.6667, abs=1e-4)
