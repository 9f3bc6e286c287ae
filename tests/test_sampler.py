import functools
import math
import os
import subprocess
import sys

import keras
import numpy as np
import pytest
from keras import ops

from vqbeam.configs import SampleConfig, SamplerSettings, VqbeamError
from vqbeam.prior.filters import guidance_scales, sampler_tensors, uniforms
from vqbeam.prior.sampler import Sampler, in_precision, sample_codes
from vqbeam.prior.transformer import CodePrior
from vqbeam.vqvae.fitting.devices import compile_function
from vqbeam.vqvae.layout import CodeLayout

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


SEVERAL_LEVELS = [
    pytest.param(DEEP, marks=pytest.mark.slow),
    pytest.param(PYRAMID, marks=[pytest.mark.slow, pytest.mark.backend]),
]


@pytest.fixture(scope="module", params=[FLAT, *SEVERAL_LEVELS], ids=CodeLayout.describe)
def any_sampler(request):
    """One sampler for each kind of layout, of which JAX takes one."""
    return Sampler(build(layout=request.param), batch_size=8)


def settings_of(layout):
    """The inputs of a program for the default settings."""
    return sampler_tensors(SamplerSettings(), layout.length)[0]


def whole_logits(model, codes, labels):
    return ops.convert_to_numpy(model({"codes": codes, "labels": labels}))


def clamps(layout):
    """Codes of which every third is kept."""
    known = np.random.default_rng(1).integers(K, size=(8, *layout.shape))
    return known, (np.arange(layout.length) % 3 == 1).reshape(layout.shape)


LABEL_ROWS = np.arange(8) % (LABELS + 1)


def test_range_and_seed(sampler):
    codes = sampler(LABEL_ROWS, seed=1)
    assert codes.min() >= 0 and codes.max() < K and codes.dtype == np.int32
    np.testing.assert_array_equal(sampler(LABEL_ROWS, seed=1), codes)
    assert np.any(sampler(LABEL_ROWS, seed=2) != codes)


@pytest.mark.backend
@pytest.mark.slow
def test_images_do_not_depend_on_the_batch(sampler):
    filters = dict(temperature=0.9, top_k=9, top_p=0.95, min_p=0.02)
    settings = SamplerSettings(guidance=1.5, guidance_schedule="linear", **filters)
    known, keep = clamps(FLAT)
    expected = sampler(LABEL_ROWS, 1, settings, known=(known, keep))
    other = Sampler(sampler.model, batch_size=3)
    np.testing.assert_array_equal(other(LABEL_ROWS, 1, settings, known=(known, keep)), expected)
    later = dict(indices=np.arange(5, 8), known=(known[5:], keep))
    last = other(LABEL_ROWS[5:], 1, settings, **later)
    np.testing.assert_array_equal(last, expected[5:])


@pytest.mark.parametrize(
    ("batch_size", "cores", "share"), [(64, 2, 32), (16, 8, 8), (10, 2, 10), (33, 4, 9), (1, 2, 1)]
)
def test_cores_share_a_batch(monkeypatch, batch_size, cores, share):
    monkeypatch.setattr("os.cpu_count", lambda: cores)
    assert Sampler(build(), batch_size).share == share


@pytest.mark.slow
def test_images_do_not_depend_on_the_cores(sampler, monkeypatch):
    monkeypatch.setattr("os.cpu_count", lambda: 3)
    other, labels, done = Sampler(sampler.model, batch_size=24), np.arange(44) % 3, []
    assert other.share == 8
    codes = other(labels, seed=1, on_batch=done.append)
    np.testing.assert_array_equal(codes, sampler(labels, seed=1))
    assert done == [8, 16, 24, 32, 40, 44]


def test_on_batch_counts_images(sampler):
    done = []
    assert sampler(np.zeros(19), seed=0, on_batch=done.append).shape == (19, *GRID)
    assert done == [8, 16, 19]
    assert sampler(np.zeros(0), seed=0).shape == (0, *GRID)


@pytest.mark.backend
def test_greedy_is_the_argmax_of_the_whole_sequence(sampler):
    codes = sampler(LABEL_ROWS, 1, SamplerSettings(temperature=0))
    best = whole_logits(sampler.model, codes, LABEL_ROWS).argmax(-1)
    np.testing.assert_array_equal(codes.reshape(8, -1), best)


@pytest.mark.slow
def test_filters_that_keep_all_change_nothing(sampler):
    expected = sampler(LABEL_ROWS, seed=1)
    for settings in (dict(top_k=K), dict(top_p=1.0), dict(top_k=K, top_p=1 - 1e-7)):
        np.testing.assert_array_equal(sampler(LABEL_ROWS, 1, SamplerSettings(**settings)), expected)


def test_codes_follow_their_uniform_numbers(any_sampler):
    layout = any_sampler.model.layout
    settings = SamplerSettings(temperature=0.7, guidance=1.5, guidance_schedule="linear")
    guidance = guidance_scales(settings, layout.length)
    codes = any_sampler(LABEL_ROWS, 1, settings)
    assert codes.shape == (8, *layout.shape)
    with_class, without = (
        whole_logits(any_sampler.model, codes, labels).astype("float64")
        for labels in (LABEL_ROWS, np.full(8, LABELS))
    )
    logits = without + guidance[:, None] * (with_class - without)
    np.testing.assert_array_equal(codes.reshape(8, -1), drawn_from(logits / 0.7))


@pytest.mark.slow
def test_attributes_are_guided_towards():
    sampler = Sampler(build(num_labels=3, conditioning="attributes"), batch_size=8)
    attributes = np.arange(8)[:, None] >> np.arange(3) & 1
    guided = SamplerSettings(guidance=2.0)
    codes = sampler(attributes, 1, guided)
    with_class, without = (
        whole_logits(sampler.model, codes, labels).astype("float64")
        for labels in (attributes, np.full((8, 3), -1))
    )
    logits = without + 2 * (with_class - without)
    np.testing.assert_array_equal(codes.reshape(8, -1), drawn_from(logits))
    # The last batch is padded.
    np.testing.assert_array_equal(sampler(attributes[:3], 1, guided), codes[:3])
    for wrong in ([0], [[0, 1]], [[0, 1, 2]]):
        with pytest.raises(VqbeamError, match="the prior's 3 attributes; give each image a 0"):
            sampler(wrong, seed=1)


def drawn_from(logits):
    """The codes of seed 1 for logits [8, T, K], in double precision."""
    probabilities = np.exp(logits - logits.max(-1, keepdims=True))
    cdf = (probabilities / probabilities.sum(-1, keepdims=True)).cumsum(-1)
    return (cdf <= uniforms(1, np.arange(8), cdf.shape[1])[..., None]).sum(-1)


def test_kept_codes_stay_and_the_others_follow_those_before_them(any_sampler):
    layout = any_sampler.model.layout
    known, keep = clamps(layout)
    codes = any_sampler(LABEL_ROWS, seed=1, known=(known, keep))
    logits = whole_logits(any_sampler.model, codes, LABEL_ROWS).astype("float64")
    expected = np.where(keep.ravel(), known.reshape(8, -1), drawn_from(logits))
    np.testing.assert_array_equal(codes.reshape(8, -1), expected)
    assert np.any(codes != any_sampler(LABEL_ROWS, seed=1))


@pytest.mark.slow
def test_a_mask_may_be_of_one_image_or_of_each(sampler):
    known = np.random.default_rng(0).integers(K, size=(8, *GRID))
    keep = np.random.default_rng(1).random((8, *GRID)) < 0.5
    codes = sampler(LABEL_ROWS, seed=1, known=(known, keep))
    np.testing.assert_array_equal(codes[keep], known[keep])
    for row in (0, 5):
        alone = sampler(LABEL_ROWS, seed=1, known=(known, keep[row]))
        np.testing.assert_array_equal(alone[row], codes[row])


def test_nothing_and_everything_kept(sampler):
    known = np.random.default_rng(0).integers(K, size=(8, *GRID))
    nothing, everything = np.zeros(GRID, bool), np.ones(GRID, bool)
    free = sampler(LABEL_ROWS, seed=1, known=(known, nothing))
    np.testing.assert_array_equal(free, sampler(LABEL_ROWS, seed=1))
    kept = sampler(LABEL_ROWS, seed=1, known=(known, everything))
    np.testing.assert_array_equal(kept, known)


@pytest.mark.slow
@pytest.mark.parametrize("guidance", [1.0, pytest.param(1.5, marks=pytest.mark.backend)])
def test_between_two_classes(sampler, guidance):
    settings = SamplerSettings(guidance=guidance)
    others, blend = (LABEL_ROWS + 2) % LABELS, np.linspace(0, 1, 8)
    codes = sampler(LABEL_ROWS, 1, settings, towards=(others, blend))
    first, second, without = (
        whole_logits(sampler.model, codes, labels).astype("float64")
        for labels in (LABEL_ROWS, others, np.full(8, LABELS))
    )
    blend = blend[:, None, None]
    logits = without + guidance * ((1 - blend) * first + blend * second - without)
    np.testing.assert_array_equal(codes.reshape(8, -1), drawn_from(logits))
    ends = sampler(LABEL_ROWS, 1, settings)[0]
    np.testing.assert_array_equal(codes[0], ends)


def test_settings_as_the_program_takes_them():
    settings = SampleConfig(temperature=0.7, top_k=3, top_p=0.9, min_p=0.1, guidance=2)
    tensors, kind = sampler_tensors(settings, 4)
    assert tensors.pop("guidance").tolist() == [2, 2, 2, 2]
    expected = {"temperature": 0.7, "top_k": 3, "top_p": 0.9, "min_p": 0.1}
    assert tensors == {name: np.float32(value) for name, value in expected.items()}
    assert kind == {"guided": True, "filtered": True}
    none = {"guided": False, "filtered": False}
    assert sampler_tensors(SampleConfig(temperature=0.7), 4)[1] == none


def test_indices_choose_the_random_numbers(sampler):
    codes = sampler(np.zeros(3), seed=1, indices=[4, 4, 0])
    np.testing.assert_array_equal(codes[0], codes[1])
    np.testing.assert_array_equal(codes[[1, 2]], sampler(np.zeros(5), seed=1)[[4, 0]])


@pytest.mark.slow
def test_guidance_zero_is_the_null_class(sampler):
    null = sampler(np.full(8, LABELS), seed=1)
    np.testing.assert_array_equal(sampler(LABEL_ROWS, 1, SamplerSettings(guidance=0)), null)
    np.testing.assert_array_equal(sampler(np.full(8, -1), seed=1), null)


@pytest.mark.backend
def test_guidance_one_is_the_class(sampler):
    program = sampler._program("exact", True, False)
    images = {"labels": LABEL_ROWS.astype("int32"), "uniforms": uniforms(1, np.arange(8), T)}
    codes = program(images, settings_of(FLAT))
    expected = sampler(LABEL_ROWS, seed=1).reshape(-1, T)
    np.testing.assert_array_equal(ops.convert_to_numpy(codes), expected)


@pytest.mark.slow
@pytest.mark.parametrize("layout", [CodeLayout(K, ((1, 1),)), CodeLayout(K, ((1, 7),))])
def test_a_growing_cache_gives_the_same_codes(layout):
    model, length = build(layout=layout), layout.length
    images = {"labels": np.arange(4, dtype="int32"), "uniforms": uniforms(0, np.arange(4), length)}
    codes = []
    for segments in (1, 4):

        def program(*tensors, segments=segments):
            options = dict(guided=False, filtered=False, segments=segments)
            return sample_codes(model, *tensors, **options)

        compiled = compile_function(program, model.weights, jit=True)
        codes.append(ops.convert_to_numpy(compiled(images, settings_of(layout))))
    np.testing.assert_array_equal(*codes)


@pytest.mark.backend
@pytest.mark.slow
def test_settings_compile_nothing_anew(compiled, monkeypatch):
    sampler, traced = Sampler(build(), batch_size=2), []
    step = CodePrior.step
    monkeypatch.setattr(CodePrior, "step", lambda *a: traced.append(1) or step(*a))
    sampler([0, 1], 0, SamplerSettings(temperature=1, top_k=3, top_p=0.9, guidance=2))
    once = len(traced)
    sampler([2, 1], 1, SamplerSettings(temperature=0.5, top_k=4, top_p=0.8, guidance=3.5))
    ramp = dict(guidance=1.5, guidance_schedule="linear")
    sampler([2], 2, SamplerSettings(temperature=0, top_k=5, min_p=0.1, **ramp))
    assert len(traced) == once > 0
    sampler([2], 2, known=(np.zeros((1, *GRID)), np.zeros(GRID)))
    twice = len(traced)
    sampler([1, 2], 2, known=(np.ones((2, *GRID)), np.ones((2, *GRID))))
    assert len(traced) == twice > once


@pytest.mark.backend
@pytest.mark.slow
@pytest.mark.skipif(keras.backend.backend() != "jax", reason="JAX tells what it compiled")
def test_a_gpu_waits_for_no_host(sampler):
    import jax

    settings = SamplerSettings(guidance=2, top_k=3, top_p=0.9)
    tensors, kind = sampler_tensors(settings, T)
    images = {"labels": LABEL_ROWS.astype("int32"), "uniforms": uniforms(1, np.arange(8), T)}
    images, tensors = jax.device_put((images, tensors))
    program = sampler._program("exact", **kind)
    expected = ops.convert_to_numpy(program(images, tensors))  # compiles
    with jax.transfer_guard("disallow"):
        codes = jax.block_until_ready(program(images, tensors))
    np.testing.assert_array_equal(ops.convert_to_numpy(codes), expected)

    # A loop of unknown length would ask the host after each turn.
    function = functools.partial(sample_codes, sampler.model, **kind)
    text = jax.jit(function).lower(images, tensors).compile().as_text()
    assert text.count(" while(") == text.count("known_trip_count") > 1


@pytest.mark.slow
@pytest.mark.backend
def test_new_weights_are_seen():
    model = build()
    sampler = Sampler(model, batch_size=2)
    before = sampler([0, 1], 0, SamplerSettings(temperature=0))
    model.head.kernel.assign(-model.head.kernel)
    assert np.any(sampler([0, 1], 0, SamplerSettings(temperature=0)) != before)


@pytest.mark.slow
def test_mixed_precision_samples():
    sampler = Sampler(build(dtype="mixed_bfloat16"), batch_size=2)
    codes = sampler([0, 1], 0, SamplerSettings(guidance=2, top_k=3))
    assert codes.shape == (2, *GRID)


@pytest.mark.backend
def test_fast_is_bfloat16_but_for_the_logits():
    model = build()
    fast = in_precision(model, "fast")
    for exact, rounded in zip(model.weights, fast.weights, strict=True):
        assert rounded.dtype == ("float32" if rounded is fast.head.kernel else "bfloat16")
        expected = ops.convert_to_numpy(ops.cast(ops.cast(exact, rounded.dtype), "float32"))
        np.testing.assert_array_equal(ops.convert_to_numpy(ops.cast(rounded, "float32")), expected)
    caches = fast.empty_caches(8, T)
    logits, updated = fast.step(fast.embed_labels(LABEL_ROWS), caches, ops.zeros((), "int32"))
    for cache in (*caches[0], *updated[0]):
        assert keras.backend.standardize_dtype(cache.dtype) == "bfloat16"
    logits = ops.convert_to_numpy(logits)
    assert logits.dtype == np.float32
    coarse = ops.convert_to_numpy(ops.cast(ops.cast(logits, "bfloat16"), "float32"))
    assert np.mean(coarse == logits) < 0.1
    assert in_precision(model, "exact") is model


@pytest.mark.backend
@pytest.mark.slow
def test_fast_samples_by_the_exact_chances_within_rounding(sampler, compiled, monkeypatch):
    dtypes, step = set(), CodePrior.step

    def seen(model, x, caches, position):
        dtypes.update(keras.backend.standardize_dtype(cache.dtype) for cache in caches[0])
        return step(model, x, caches, position)

    monkeypatch.setattr(CodePrior, "step", seen)
    codes = sampler(LABEL_ROWS, 1, SamplerSettings(precision="fast"))
    assert dtypes == {"bfloat16"}
    model = sampler.model
    logits = whole_logits(model, codes, LABEL_ROWS).astype("float64")
    flat, length = codes.reshape(8, -1, 1), model.layout.length
    chances = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    above = np.take_along_axis(chances.cumsum(-1), flat, axis=-1)[..., 0]
    below = above - np.take_along_axis(chances, flat, axis=-1)[..., 0]
    numbers = uniforms(1, np.arange(8), length)
    assert np.all((below - 0.01 <= numbers) & (numbers < above + 0.01))


def test_unconditional_model():
    codes = Sampler(build(num_labels=0), batch_size=2)(np.full(3, -1), seed=0)
    assert codes.shape == (3, *GRID)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (dict(settings=SamplerSettings(top_k=K + 1)), f"top_k is {K + 1}; the model has {K} codes"),
        (dict(towards=([LABELS + 1], [0.5])), f"label {LABELS + 1} is out of range"),
        (dict(labels=[LABELS + 1]), f"label {LABELS + 1} is out of range.* 0 to {LABELS - 1}"),
        (dict(labels=[-2]), "label -2 is out of range"),
    ],
)
def test_names_what_does_not_fit_the_model(sampler, inputs, message):
    with pytest.raises(VqbeamError, match=message):
        sampler(**(dict(labels=[0], seed=0) | inputs))


def test_an_unconditional_model_takes_neither_label_nor_guidance():
    sampler = Sampler(build(num_labels=0), batch_size=2)
    with pytest.raises(VqbeamError, match="guidance is 2, but the prior is trained with no labels"):
        sampler([-1], 0, SamplerSettings(guidance=2))
    with pytest.raises(VqbeamError, match="label 3 is given, but the prior was trained without"):
        sampler([3], 0)


OTHER_BACKEND = """
import sys
import keras, numpy as np
from vqbeam.configs import SamplerSettings
from vqbeam.prior.sampler import Sampler
model = keras.saving.load_model(sys.argv[1])
sampler = Sampler(model, 4)
known = tuple(np.load(sys.argv[2])[name] for name in ("known", "keep"))
free = sampler(np.arange(4), 5, SamplerSettings(top_p=0.9, guidance=1.5))
settings = SamplerSettings(min_p=0.1, guidance=1.5, guidance_schedule="linear")
clamped = sampler(np.arange(4), 5, settings, known=known)
np.savez(sys.argv[3], free=free, clamped=clamped)
"""


@pytest.mark.system
def test_backends_draw_the_same_images(sampler, tmp_path):
    pytest.importorskip("jax")
    other = "jax" if keras.backend.backend() == "tensorflow" else "tensorflow"
    sampler.model.save(tmp_path / "model.keras")
    known, keep = clamps(FLAT)
    known = known[:4]
    np.savez(tmp_path / "clamped.npz", known=known, keep=keep)
    files = [tmp_path / name for name in ("model.keras", "clamped.npz", "codes.npz")]
    subprocess.run(
        [sys.executable, "-c", OTHER_BACKEND, *files],
        env=os.environ | {"KERAS_BACKEND": other, "PYTHONPATH": os.pathsep.join(sys.path)},
        check=True,
    )
    drawn = np.load(files[-1])
    free = sampler(np.arange(4), 5, SamplerSettings(top_p=0.9, guidance=1.5))
    np.testing.assert_array_equal(drawn["free"], free)
    settings = SamplerSettings(min_p=0.1, guidance=1.5, guidance_schedule="linear")
    expected = sampler(np.arange(4), 5, settings, known=(known, keep))
    np.testing.assert_array_equal(drawn["clamped"], expected)
