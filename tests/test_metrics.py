import keras
import numpy as np
import pytest
from keras import ops

from vqvae.metrics import CodebookUse, perplexity, psnr


def numbers(result):
    return {name: float(ops.convert_to_numpy(value)) for name, value in result.items()}


def test_codebook_use_counts_over_batches():
    metric = CodebookUse(6)
    batches = [np.array([[0, 1], [1, 2]]), np.array([[1], [5]]), np.array([0, 0, 0])]
    for batch in batches:
        metric.update_state(batch.astype("int32"))
    share = np.array([4, 3, 1, 1]) / 9
    result = numbers(metric.result())
    assert set(result) == {"perplexity", "codes_used"}
    assert result["perplexity"] == pytest.approx(np.exp(-np.sum(share * np.log(share))), rel=1e-5)
    assert result["codes_used"] == pytest.approx(4 / 6)
    metric.reset_state()
    metric.update_state(np.array([3, 3], "int32"))
    assert numbers(metric.result()) == pytest.approx({"perplexity": 1, "codes_used": 1 / 6})


def test_codebook_use_at_its_bounds():
    metric = CodebookUse(8)
    metric.update_state(np.arange(8, dtype="int32").reshape(2, 2, 2))
    assert numbers(metric.result()) == pytest.approx({"perplexity": 8, "codes_used": 1}, rel=1e-5)
    nothing = numbers(CodebookUse(8).result())
    assert nothing["codes_used"] == 0 and np.isfinite(nothing["perplexity"])


def test_codebook_use_round_trip():
    metric = CodebookUse(8, name="use")
    twin = keras.saving.deserialize_keras_object(keras.saving.serialize_keras_object(metric))
    assert (twin.num_codes, twin.name) == (8, "use")


def test_perplexity():
    assert perplexity(np.array([0, 5, 0])) == pytest.approx(1)
    assert perplexity(np.full(7, 3)) == pytest.approx(7)
    # Entropy of 1/2, 1/4, 1/4 is 1.5 bits.
    assert perplexity(np.array([2, 0, 1, 1])) == pytest.approx(2**1.5)


def test_perplexity_agrees_with_the_metric():
    codes = np.random.default_rng(0).integers(0, 20, 300) ** 2 // 20
    metric = CodebookUse(25)
    metric.update_state(codes.astype("int32"))
    expected = perplexity(np.bincount(codes, minlength=25))
    assert numbers(metric.result())["perplexity"] == pytest.approx(expected, rel=1e-5)


def test_psnr():
    assert psnr(255.0**2) == pytest.approx(0)
    assert psnr(255.0**2 / 1000) == pytest.approx(30)
    assert psnr(1.0) == pytest.approx(48.1308, abs=1e-4)
