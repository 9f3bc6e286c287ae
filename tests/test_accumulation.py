import keras
import numpy as np
import pytest
import tensorflow as tf

from vqbeam.configs import PriorConfig
from vqbeam.prior.training import build_optimizer
from vqbeam.prior.transformer import CodePrior
from vqbeam.vqvae.fitting.fit import AveragedWeights
from vqbeam.vqvae.layout import CodeLayout
from vqbeam.vqvae.storage.records import UNTUNED

pytestmark = pytest.mark.slow

LAYOUT = CodeLayout(7, ((2, 2),))
BATCH, STEPS = 32, 3


def array(tensor):
    return np.asarray(tensor).copy()


def trained(parts, dtype="float32", dropout=0.0):
    """A prior after three steps with every option, and its history and inputs."""
    keras.utils.set_random_seed(0)
    model = CodePrior(
        LAYOUT, num_labels=3, layers=1, width=8, heads=2, dropout=dropout, dtype=dtype
    )
    model.parts = parts
    settings = PriorConfig(
        steps=STEPS, warmup_steps=1, learning_rate=0.01, clip_norm=0.1, weight_ema=0.5
    )
    model.compile(build_optimizer(settings))
    numbers = np.random.default_rng(0)
    inputs = {
        "codes": numbers.integers(7, size=(BATCH * STEPS, 2, 2), dtype="int32"),
        "labels": numbers.integers(3, size=BATCH * STEPS, dtype="int32"),
    }
    # Unlike halves and quarters, so that a part of a batch is not as good as the whole.
    inputs["codes"][::4] = 1
    batches = tf.data.Dataset.from_tensor_slices(inputs).batch(BATCH).with_options(UNTUNED)
    history = model.fit(batches, shuffle=False, verbose=0, callbacks=[AveragedWeights()])
    return model, history.history


@pytest.fixture(scope="module")
def whole():
    return trained(1)


@pytest.mark.backend
def test_parts_are_as_good_as_the_whole(whole):
    model, history = trained(8)
    assert history["loss"] == pytest.approx(whole[1]["loss"], rel=1e-5)
    assert int(model.optimizer.iterations) == STEPS
    # Weights, averages, moments: all the state there is.
    states = [[*m.weights, *m.optimizer.variables] for m in (model, whole[0])]
    for one, other in zip(*states, strict=True):
        # Adam divides by the size of the gradient, which rounding changes.
        np.testing.assert_allclose(array(one), array(other), atol=2e-4, err_msg=one.path)


@pytest.mark.backend
def test_with_a_scaled_loss(whole):
    model, history = trained(2, dtype="mixed_float16")
    assert history["loss"] == pytest.approx(whole[1]["loss"], rel=2e-3)
    assert int(model.optimizer.inner_optimizer.iterations) == STEPS


@pytest.mark.backend
def test_parts_draw_random_numbers_of_their_own(whole):
    one, again = (trained(2, dropout=0.5)[1]["loss"] for _ in range(2))
    assert one == again != whole[1]["loss"]
