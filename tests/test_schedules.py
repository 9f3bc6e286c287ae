import math

import numpy as np
import pytest

from vqbeam.vqvae.fitting.optimizers import learning_rate


def rates(steps, **arguments):
    schedule = learning_rate(0.5, steps=steps, **arguments)
    return np.array([float(schedule(step)) for step in range(steps + 1)])


def test_cosine_in_numpy():
    found = rates(40, warmup_steps=0)
    share = np.arange(41) / 40
    expected = 0.5 * (0.99 * (1 + np.cos(math.pi * share)) / 2 + 0.01)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", ["cosine", "constant"])
def test_warm_up_is_linear_from_zero_to_the_peak(kind):
    found = rates(40, warmup_steps=10, kind=kind)
    np.testing.assert_allclose(found[:11], 0.05 * np.arange(11), rtol=1e-5)
    after = np.diff(found[10:])
    assert (after < 0).all() if kind == "cosine" else np.abs(after).max() < 1e-6
    assert found[-1] == pytest.approx(0.005 if kind == "cosine" else 0.5, rel=1e-4)


def test_constant_stays():
    np.testing.assert_allclose(rates(20, warmup_steps=0, kind="constant"), 0.5, rtol=1e-6)


@pytest.mark.parametrize("warmup_steps", [5, 9])
def test_a_warm_up_as_long_as_training_is_allowed(warmup_steps):
    found = rates(5, warmup_steps=warmup_steps)
    np.testing.assert_allclose(found, 0.5 * np.arange(6) / warmup_steps, rtol=1e-5)
