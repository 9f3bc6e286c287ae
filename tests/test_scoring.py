import keras
import numpy as np
import pytest

from vqbeam.prior.sampler import code_scorer
from vqbeam.prior.transformer import CodePrior
from vqbeam.vqvae.layout import CodeLayout


def build(layout):
    keras.utils.set_random_seed(3)
    prior = CodePrior(layout, num_labels=2, layers=1, width=16, heads=2, dropout=0.5)
    for weight in prior.weights:
        if weight.dtype == "float32":
            weight.assign(weight + 0.3 * keras.random.normal(weight.shape))
    return prior


@pytest.mark.backend
def test_in_numpy_from_the_logits():
    layout = CodeLayout(11, ((2, 2),), 2)
    prior = build(layout)
    codes = np.random.default_rng(0).integers(11, size=(5, *layout.shape), dtype="int32")
    labels = np.array([0, 1, 2, -1, 1], "int32")
    logits = keras.ops.convert_to_numpy(prior({"codes": codes, "labels": labels})).astype("float64")
    shares = np.exp(logits) / np.exp(logits).sum(axis=-1, keepdims=True)
    chosen = np.take_along_axis(shares, codes.reshape(5, -1, 1), axis=-1)[..., 0]
    found = code_scorer(prior)(codes, labels)
    assert found.shape == (5,) and found.dtype == np.float32
    np.testing.assert_allclose(found, np.log(chosen).sum(axis=1), rtol=1e-5)
    assert len(set(found)) == 5
    fast = code_scorer(prior, precision="fast")(codes, labels)
    assert fast.dtype == np.float32 and np.any(fast != found)
    np.testing.assert_allclose(fast, np.log(chosen).sum(axis=1), rtol=0.02)


def test_all_images_together_have_the_probability_one():
    prior = build(CodeLayout(3, ((1, 2),)))
    codes = np.array([[[a, b]] for a in range(3) for b in range(3)], "int32")
    for label in (0, 1, -1):
        nats = code_scorer(prior)(codes, np.full(9, label, "int32"))
        assert np.exp(nats.astype("float64")).sum() == pytest.approx(1, abs=1e-5)
