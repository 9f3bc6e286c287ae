import math
import os
import subprocess
import sys

import keras
import numpy as np
import pytest
from keras import ops

from configs import VqbeamError
from prior.sampler import Sampler, draw_codes, sample_codes
from prior.transformer import CodePrior
from prior.uniforms import uniforms
from vqvae.compilation import compile_function
from vqvae.layout import CodeLayout

# A grid of one code has nothing to attend to but itself.
pytestmark = pytest.mark.filterwarnings("ignore:You are using a softmax over axis")

K, GRID, LABELS = 11, (2, 3), 4
T = math.prod(GRID)
FLAT = CodeLayout(K, (GRID,))
DEEP = CodeLayout(K, ((1, 2),), depth=3)
PYRAMID = CodeLayout(K, ((1, 1), (2, 2)))


def build(**changes):
    keras.utils.set_random_seed(0)
    arguments = dict(layout=FLAT, num_labels=LABELS, layers=1, width=16, heads=2)
    model = CodePrior(**(arguments | changes))
    shape = model.head.kernel.shape
    model.head.kernel.assign(np.random.default_rng(0).normal(size=shape, scale=0.5))
    return model


@pytest.fixture(scope="module")
def sampler():
    return Sampler(build(), batch_size=8)


@pytest.fixture(scope="module", params=[FLAT, DEEP, PYRAMID], ids=CodeLayout.describe)
def any_sampler(request):
    """One sampler for each kind of layout."""
    return Sampler(build(layout=request.param), batch_size=8)


def whole_logits(model, codes, labels):
    return ops.convert_to_numpy(model({"codes": codes, "labels": labels}))


LABEL_ROWS = np.arange(8) % (LABELS + 1)


def test_shape_range_and_seed(any_sampler):
    codes = any_sampler(LABEL_ROWS, seed=1)
    assert codes.shape == (8, *any_sampler.model.layout.shape) and codes.dtype == np.int32
    assert codes.min() >= 0 and codes.max() < K
    np.testing.assert_array_equal(any_sampler(LABEL_ROWS, seed=1), codes)
    assert np.any(any_sampler(LABEL_ROWS, seed=2) != codes)


@pytest.mark.parametrize(
    ("batch_size", "settings"),
    [(1, {}), (3, dict(temperature=0.9, top_k=9, top_p=0.95, guidance=1.5))],
)
def test_images_do_not_depend_on_the_batch(any_sampler, batch_size, settings):
    expected = any_sampler(LABEL_ROWS, seed=1, **settings)
    other = Sampler(any_sampler.model, batch_size)
    np.testing.assert_array_equal(other(LABEL_ROWS, seed=1, **settings), expected)
    later = other(LABEL_ROWS[5:], seed=1, first_index=5, **settings)
    np.testing.assert_array_equal(later, expected[5:])


def test_on_batch_counts_images(sampler):
    done = []
    assert sampler(np.zeros(19), seed=0, on_batch=done.append).shape == (19, *GRID)
    assert done == [8, 16, 19]
    assert sampler(np.zeros(0), seed=0).shape == (0, *GRID)


def test_greedy_is_the_argmax_of_the_whole_sequence(any_sampler):
    codes = any_sampler(LABEL_ROWS, seed=1, temperature=0)
    best = whole_logits(any_sampler.model, codes, LABEL_ROWS).argmax(-1)
    np.testing.assert_array_equal(codes.reshape(8, -1), best)


@pytest.mark.parametrize(
    "settings", [dict(top_k=1), dict(top_p=1e-6), dict(temperature=1e-5), dict(temperature=1e-30)]
)
def test_limits_of_the_settings_are_greedy(sampler, settings):
    greedy = sampler(LABEL_ROWS, seed=1, temperature=0)
    np.testing.assert_array_equal(sampler(LABEL_ROWS, seed=2, **settings), greedy)


def test_filters_that_keep_all_change_nothing(sampler):
    expected = sampler(LABEL_ROWS, seed=1)
    for settings in (dict(top_k=K), dict(top_p=1.0), dict(top_k=K, top_p=1 - 1e-7)):
        np.testing.assert_array_equal(sampler(LABEL_ROWS, seed=1, **settings), expected)


def test_codes_follow_their_uniform_numbers(any_sampler):
    codes = any_sampler(LABEL_ROWS, seed=1, temperature=0.7, guidance=2.0)
    scores = [
        whole_logits(any_sampler.model, codes, labels).astype("float64")
        for labels in (LABEL_ROWS, np.full(8, LABELS))
    ]
    scores = (scores[1] + 2.0 * (scores[0] - scores[1])) / 0.7
    probabilities = np.exp(scores - scores.max(-1, keepdims=True))
    cdf = (probabilities / probabilities.sum(-1, keepdims=True)).cumsum(-1)
    expected = (cdf <= uniforms(1, np.arange(8), cdf.shape[1])[..., None]).sum(-1)
    np.testing.assert_array_equal(codes.reshape(8, -1), expected)


def test_frequencies_for_one_code():
    model = build(layout=CodeLayout(K, ((1, 1),)))
    codes = Sampler(model, 2000)(np.full(20_000, 2), seed=0, temperature=1.5).ravel()
    scores = whole_logits(model, np.zeros((1, 1, 1), "int32"), np.array([2])).ravel() / 1.5
    expected = 20_000 * np.exp(scores) / np.exp(scores).sum()
    counts = np.bincount(codes, minlength=K)
    likely = expected > 5
    chi_square = np.sum((counts - expected)[likely] ** 2 / expected[likely])
    assert likely.sum() > 8 and chi_square < 35  # 30 is the 0.1% point for 10 degrees


def test_guidance_zero_is_the_null_class(sampler):
    null = sampler(np.full(8, LABELS), seed=1)
    np.testing.assert_array_equal(sampler(LABEL_ROWS, seed=1, guidance=0), null)
    np.testing.assert_array_equal(sampler(np.full(8, -1), seed=1), null)


def test_guidance_one_is_the_class(sampler):
    program = sampler._program(guided=True, filtered=False)
    ones = [np.float32(1)] * 4
    codes = program(LABEL_ROWS.astype("int32"), uniforms(1, np.arange(8), T), *map(np.array, ones))
    expected = sampler(LABEL_ROWS, seed=1, guidance=1).reshape(-1, T)
    np.testing.assert_array_equal(ops.convert_to_numpy(codes), expected)


@pytest.mark.parametrize(
    "layout", [CodeLayout(K, ((1, 1),)), CodeLayout(K, ((1, 7),)), DEEP, PYRAMID]
)
def test_a_growing_cache_gives_the_same_codes(layout):
    model, length = build(layout=layout), layout.length
    settings = [np.array(x, "float32") for x in (1, K, 1, 1)]
    codes = []
    for segments in (1, 4):

        def program(*tensors, segments=segments):
            options = dict(guided=False, filtered=False, segments=segments)
            return sample_codes(model, *tensors, **options)

        numbers = uniforms(0, np.arange(4), length)
        tensors = (np.arange(4, dtype="int32"), numbers, *settings)
        codes.append(
            ops.convert_to_numpy(compile_function(program, model.weights, jit=True)(*tensors))
        )
    np.testing.assert_array_equal(*codes)


def test_settings_compile_nothing_anew(monkeypatch):
    sampler, traced = Sampler(build(), batch_size=2), []
    step = CodePrior.step
    monkeypatch.setattr(CodePrior, "step", lambda *a: traced.append(1) or step(*a))
    sampler([0, 1], 0, temperature=1, top_k=3, top_p=0.9, guidance=2)
    once = len(traced)
    sampler([2, 1], 1, temperature=0.5, top_k=4, top_p=0.8, guidance=3.5)
    sampler([2], 2, temperature=0, top_k=5, guidance=0.5)
    assert len(traced) == once > 0


def test_new_weights_are_seen():
    model = build()
    sampler = Sampler(model, batch_size=2)
    before = sampler([0, 1], 0, temperature=0)
    model.head.kernel.assign(-model.head.kernel)
    assert np.any(sampler([0, 1], 0, temperature=0) != before)


def test_mixed_precision_samples():
    codes = Sampler(build(dtype="mixed_bfloat16"), batch_size=2)([0, 1], 0, guidance=2, top_k=3)
    assert codes.shape == (2, *GRID)


def test_unconditional_model():
    codes = Sampler(build(num_labels=0), batch_size=2)(np.full(3, -1), seed=0)
    assert codes.shape == (3, *GRID)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(temperature=-1), "temperature is -1"),
        (dict(temperature=math.nan), "temperature is nan"),
        (dict(top_k=K + 1), f"top_k is {K + 1}; it must be from 1 to {K}"),
        (dict(top_k=-1), "top_k is -1"),
        (dict(top_p=0), "top_p is 0"),
        (dict(top_p=1.1), "top_p is 1.1"),
        (dict(guidance=-1), "guidance is -1"),
        (dict(labels=[LABELS + 1]), f"label {LABELS + 1} is out of range.* 0 to {LABELS - 1}"),
        (dict(labels=[-2]), "label -2 is out of range"),
    ],
)
def test_names_what_is_out_of_range(sampler, settings, message):
    with pytest.raises(VqbeamError, match=message):
        sampler(**(dict(labels=[0], seed=0) | settings))


def test_an_unconditional_model_takes_neither_label_nor_guidance():
    sampler = Sampler(build(num_labels=0), batch_size=2)
    with pytest.raises(VqbeamError, match="guidance is 2, but the prior was trained without"):
        sampler([-1], 0, guidance=2)
    with pytest.raises(VqbeamError, match="label 3 is given, but the prior was trained without"):
        sampler([3], 0)


def numpy_draw(logits, uniform, temperature, top_k, top_p):
    """The code for one row, by sorting, in double precision."""
    order = np.argsort(-logits, kind="stable")[:top_k]
    weights = np.exp((logits[order] - logits[order[0]]).astype("float64") / temperature)
    weights /= weights.sum()
    kept = order[np.cumsum(weights) - weights < top_p]
    probabilities = np.zeros(len(logits))
    probabilities[kept] = weights[: len(kept)]
    cdf = np.cumsum(probabilities)
    return np.argmax(cdf > uniform * cdf[-1])


def compiled_draw(filtered=True):
    def draw(*tensors):
        return draw_codes(*tensors, filtered=filtered)

    return compile_function(draw, [], jit=True)


@pytest.mark.parametrize("tied", [False, True])
def test_draws_against_numpy(tied):
    random, draw = np.random.default_rng(0), compiled_draw()
    for _ in range(20):
        logits = random.normal(size=(32, 50), scale=3).astype("float32")
        if tied:
            logits = logits.round()
        uniform = random.random((32, 1), dtype="float32")
        settings = random.uniform(0.3, 2), random.integers(1, 51), random.uniform(0.05, 1)
        scalars = [np.array(x, "float32") for x in settings]
        codes = ops.convert_to_numpy(draw(logits, uniform, *scalars)).ravel()
        rows = zip(logits, uniform, strict=True)
        np.testing.assert_array_equal(codes, [numpy_draw(*row, *settings) for row in rows])


def test_a_filtered_code_is_never_drawn():
    random, draw = np.random.default_rng(0), compiled_draw()
    scalars = [np.array(x, "float32") for x in (1, 3, 1)]
    for uniform in (0.0, 0.5, 1 - 2**-24):
        logits = random.normal(size=(500, 512)).astype("float32")
        codes = ops.convert_to_numpy(draw(logits, np.full((500, 1), uniform, "float32"), *scalars))
        best = np.argsort(-logits, axis=-1)[:, :3]
        assert np.all(np.any(codes == best, axis=-1))
        if uniform != 0.5:
            extreme = best.min(-1) if uniform == 0 else best.max(-1)
            np.testing.assert_array_equal(codes.ravel(), extreme)


@pytest.mark.parametrize("filtered", [False, True])
def test_extreme_logits_draw_a_code(filtered):
    logits = np.array([[0, 1e4, 0], [-1e30, 0, -1e30], [0, 0, 0], [-1e4, -1e4, 1]], "float32")
    uniform = np.full((4, 1), 1 - 2**-24, "float32")
    for temperature, tied in ((1, 2), (1e-20, 2), (0, 0)):
        scalars = [np.array(x, "float32") for x in (temperature, 3, 1)]
        codes = ops.convert_to_numpy(compiled_draw(filtered)(logits, uniform, *scalars))
        np.testing.assert_array_equal(codes.ravel(), [1, 1, tied, 2])


OTHER_BACKEND = """
import sys
import keras, numpy as np
from prior.sampler import Sampler
model = keras.saving.load_model(sys.argv[1])
np.save(sys.argv[2], Sampler(model, 4)(np.arange(4), 5, top_p=0.9, guidance=1.5))
"""


@pytest.mark.slow
def test_backends_draw_the_same_images(sampler, tmp_path):
    pytest.importorskip("jax")
    other = "jax" if keras.backend.backend() == "tensorflow" else "tensorflow"
    sampler.model.save(tmp_path / "model.keras")
    subprocess.run(
        [sys.executable, "-c", OTHER_BACKEND, tmp_path / "model.keras", tmp_path / "codes.npy"],
        env=os.environ | {"KERAS_BACKEND": other, "PYTHONPATH": os.pathsep.join(sys.path)},
        check=True,
    )
    expected = sampler(np.arange(4), 5, top_p=0.9, guidance=1.5)
    np.testing.assert_array_equal(np.load(tmp_path / "codes.npy"), expected)
