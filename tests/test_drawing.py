import functools

import numpy as np
import pytest
from keras import ops

from vqbeam.configs import SamplerSettings
from vqbeam.prior.filters import sample_code, sampler_tensors
from vqbeam.vqvae.fitting.devices import compile_function


def numpy_draw(logits, uniform, temperature, top_k, top_p, min_p):
    """The code for one row, by sorting, in double precision."""
    order = np.argsort(-logits, kind="stable")[:top_k]
    weights = np.exp((logits[order] - logits[order[0]]).astype("float64") / temperature)
    weights /= weights.sum()
    kept = order[(np.cumsum(weights) - weights < top_p) & (weights >= min_p * weights[0])]
    probabilities = np.zeros(len(logits))
    probabilities[kept] = weights[: len(kept)]
    cdf = np.cumsum(probabilities)
    drawn = np.argmax(cdf > uniform * cdf[-1])
    # So near to a border between two codes, float32 may fall on its other side.
    near = np.abs(cdf[probabilities > 0] / cdf[-1] - uniform).min() < 1e-6
    return -1 if near else drawn


def compiled_draw(filtered=True):
    """Returns a function of logits, uniform numbers and settings, which are off by default."""
    program = compile_function(functools.partial(sample_code, filtered=filtered), [], jit=True)

    def draw(logits, uniform, **settings):
        tensors, _ = sampler_tensors(SamplerSettings(), 1)
        tensors |= {name: np.array(value, "float32") for name, value in settings.items()}
        return ops.convert_to_numpy(program(logits, uniform, tensors)).ravel()

    return draw


@pytest.fixture(params=["cpu", "gpu"])
def device(request, monkeypatch):
    """Each way to find the largest, though on the device at hand."""
    monkeypatch.setattr("vqbeam.prior.filters.on_cpu", lambda: request.param == "cpu")


@pytest.mark.backend
@pytest.mark.slow
def test_draws_against_numpy(device):
    random, draw = np.random.default_rng(0), compiled_draw()
    for turn in range(20):
        logits = random.normal(size=(32, 50), scale=3).astype("float32")
        if turn % 2:  # with ties
            logits = logits.round()
        uniform = random.random((32, 1), dtype="float32")
        settings = {
            "temperature": random.uniform(0.3, 2),
            "top_k": random.integers(1, 51),
            "top_p": random.uniform(0.05, 1),
            "min_p": random.choice([0, random.uniform(0, 0.5)]),
        }
        codes = draw(logits, uniform, **settings)
        rows = zip(logits, uniform, strict=True)
        expected = np.array([numpy_draw(*row, **settings) for row in rows])
        np.testing.assert_array_equal(codes[expected >= 0], expected[expected >= 0])
        assert np.mean(expected >= 0) > 0.9


def test_a_filtered_code_is_never_drawn(device):
    random, draw = np.random.default_rng(0), compiled_draw()
    for uniform in (0.0, 0.5, 1 - 2**-24):
        logits = random.normal(size=(500, 512)).astype("float32")
        codes = draw(logits, np.full((500, 1), uniform, "float32"), top_k=3)
        best = np.argsort(-logits, axis=-1)[:, :3]
        assert np.all(np.any(codes[:, None] == best, axis=-1))
        if uniform != 0.5:
            extreme = best.min(-1) if uniform == 0 else best.max(-1)
            np.testing.assert_array_equal(codes, extreme)


@pytest.mark.parametrize(
    "settings", [dict(top_k=1), dict(top_p=1e-6), dict(min_p=0.999), dict(temperature=1e-30)]
)
def test_limits_of_the_settings_are_greedy(settings):
    random = np.random.default_rng(0)
    logits = random.normal(size=(32, 50)).astype("float32")
    uniform = random.random((32, 1), dtype="float32")
    np.testing.assert_array_equal(compiled_draw()(logits, uniform, **settings), logits.argmax(-1))


@pytest.mark.backend
def test_extreme_logits_draw_a_code(device):
    logits = np.array([[0, 1e4, 0], [-1e30, 0, -1e30], [0, 0, 0], [-1e4, -1e4, 1]], "float32")
    uniform = np.full((4, 1), 1 - 2**-24, "float32")
    for draw in (compiled_draw(filtered=False), compiled_draw(filtered=True)):
        for temperature, tied in ((1, 2), (1e-20, 2), (0, 0)):
            codes = draw(logits, uniform, temperature=temperature, top_k=3)
            np.testing.assert_array_equal(codes, [1, 1, tied, 2])


@pytest.mark.backend
def test_min_p_keeps_what_is_likely_enough_at_the_temperature():
    # Shares of the likeliest at temperature 1: 1, 0.4, 0.2; at temperature 2 their square roots.
    logits = np.log([[0.4, 1, 0.2]]).astype("float32").repeat(1000, 0)
    uniform = np.linspace(0, 1, 1000, endpoint=False, dtype="float32")[:, None]
    kept = {(1, 0.3): {0, 1}, (2, 0.3): {0, 1, 2}, (2, 0.5): {0, 1}, (0.5, 0.3): {1}}
    for (temperature, min_p), expected in kept.items():
        codes = compiled_draw()(logits, uniform, temperature=temperature, min_p=min_p)
        assert set(codes.tolist()) == expected
