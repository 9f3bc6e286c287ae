import keras
import numpy as np
import pytest
from keras import ops

from vqvae.quantizer import VectorQuantizer, squared_distances, straight_through

K, D = 9, 4


def build(codebook=None, **changes):
    keras.utils.set_random_seed(0)
    layer = VectorQuantizer(**({"num_codes": K, "code_dim": D} | changes))
    layer.build((None, None, None, layer.code_dim))
    if codebook is None:
        codebook = numbers(1).normal(size=layer.codebook.shape)
    layer.codebook.assign(np.float32(codebook))
    return layer


def numbers(seed):
    return np.random.default_rng(seed)


def latents(*shape, seed=0):
    return numbers(seed).normal(size=(*shape, D)).astype("float32")


def array(tensor):
    return np.asarray(tensor).copy()


def state(layer):
    return [array(weight) for weight in layer.weights]


def nearest_codes(z, codebook):
    """The assignment by the definition of a distance, in float64."""
    z, codebook = np.float64(z), np.float64(codebook)
    return np.square(z[..., None, :] - codebook).sum(-1).argmin(-1)


def distance_margin(z, codebook):
    """How much nearer the nearest code is than the next one."""
    distances = np.square(np.float64(z)[..., None, :] - np.float64(codebook)).sum(-1)
    first, second = np.sort(distances, axis=-1)[..., :2].T
    return (second - first).T


class NumpyAverages:
    """Appendix A.1 of van den Oord et al. 2017, from zero, in float64."""

    def __init__(self, codebook, decay, epsilon):
        self.codebook, self.decay, self.epsilon = np.float64(codebook), decay, epsilon
        self.counts, self.sums = np.zeros(len(codebook)), np.zeros_like(self.codebook)
        self.usage = np.zeros(len(codebook))

    def step(self, z):
        z = np.float64(z).reshape(-1, z.shape[-1])
        codes = nearest_codes(z, self.codebook)
        chosen = np.eye(len(self.codebook))[codes]
        self.usage = 0.99 * self.usage + chosen.sum(0)
        self.counts = self.decay * self.counts + (1 - self.decay) * chosen.sum(0)
        self.sums = self.decay * self.sums + (1 - self.decay) * chosen.T @ z
        total = self.counts.sum()
        smoothed = (self.counts + self.epsilon) / (total + len(self.counts) * self.epsilon) * total
        for k in set(codes):
            self.codebook[k] = self.sums[k] / smoothed[k]


def test_distances():
    z, codebook = latents(20), latents(7, seed=1)
    expected = np.square(z[:, None].astype("float64") - codebook).sum(-1)
    np.testing.assert_allclose(array(squared_distances(z, codebook)), expected, atol=1e-5)


@pytest.mark.parametrize("update", ["ema", "gradient"])
@pytest.mark.parametrize("shape", [(2, 3, 5), (1, 1, 1), (4, 2, 2)])
def test_codes_and_values(update, shape):
    layer = build(update=update)
    z = latents(*shape)
    codebook = array(layer.codebook)
    result = layer(z)
    codes = array(result.codes)
    np.testing.assert_array_equal(codes, nearest_codes(z, codebook))
    assert codes.dtype == np.int32 and codes.shape == shape
    np.testing.assert_allclose(array(result.quantized), codebook[codes], atol=1e-6)
    np.testing.assert_array_equal(array(layer.lookup(codes)), codebook[codes])
    np.testing.assert_array_equal(array(layer.nearest(z)), codes)


def test_the_first_of_equal_codes_is_taken():
    layer = build(np.ones((K, D)))
    np.testing.assert_array_equal(array(layer.nearest(latents(1, 2, 3))), 0)


def test_losses():
    z = latents(2, 3, 5)
    codebook = array(build().codebook)
    error = np.square(z.astype("float64") - codebook[nearest_codes(z, codebook)]).mean()
    learned = build(update="gradient")(z)
    np.testing.assert_allclose(array(learned.codebook_loss), error, rtol=1e-5)
    np.testing.assert_allclose(array(learned.commitment_loss), error, rtol=1e-5)
    averaged = build(update="ema")(z)
    assert array(averaged.codebook_loss) == 0
    np.testing.assert_allclose(array(averaged.commitment_loss), error, rtol=1e-5)


def test_straight_through_has_the_value_of_the_code():
    z, quantized = latents(3), latents(3, seed=1)
    np.testing.assert_allclose(array(straight_through(z, quantized)), quantized, atol=1e-6)


@pytest.mark.parametrize("decay", [0.99, 0.5, 0.0])
def test_moving_averages_over_several_steps(decay):
    layer = build(decay=decay)
    # Large enough that smoothing which leaks into the averages would show.
    layer.epsilon = 0.3
    expected = NumpyAverages(array(layer.codebook), decay, layer.epsilon)
    for seed in range(6):
        z = latents(2, 3, 2, seed=seed)
        layer(z, training=True)
        expected.step(z)
        np.testing.assert_allclose(array(layer.ema_counts), expected.counts, rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(array(layer.ema_sums), expected.sums, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(array(layer.codebook), expected.codebook, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(array(layer.usage), expected.usage, rtol=1e-5)


def test_smoothing_is_slight():
    assert build().epsilon == 1e-5


def test_first_step_takes_each_chosen_code_to_the_mean_of_its_vectors():
    layer = build()
    before = array(layer.codebook)
    z = latents(2, 3, 5)
    codes = array(layer(z, training=True).codes)
    after = array(layer.codebook)
    for code in range(K):
        mean = z[codes == code].mean(0) if (codes == code).any() else before[code]
        np.testing.assert_allclose(after[code], mean, rtol=2e-3, atol=1e-5)


def test_codes_that_nothing_chooses_hold_their_place():
    layer = build()
    # All codes but the first are chosen once, and never again.
    away = array(layer.codebook)[None, None]
    layer(away, training=True)
    held = array(layer.codebook)
    near_first = np.broadcast_to(held[0], (1, 2, 2, D)).astype("float32")
    for _ in range(250):
        layer(near_first, training=True)
    after = array(layer.codebook)
    np.testing.assert_array_equal(after[1:], held[1:])
    np.testing.assert_allclose(after[0], held[0], rtol=1e-3, atol=1e-5)
    # Chosen again, a code goes to the vectors that chose it, and does not jump past them.
    back = held[3] + np.float32(0.01)
    layer(back[None, None, None], training=True)
    between = array(layer.codebook)[3]
    assert np.abs(between - back).max() < 0.011


def test_assigns_before_the_codebook_moves():
    layer = build(decay=0.0)
    before = array(layer.codebook)
    z = latents(2, 3, 5)
    result = layer(z, training=True)
    assert np.abs(array(layer.codebook) - before).max() > 0.1
    codes = array(result.codes)
    np.testing.assert_array_equal(codes, nearest_codes(z, before))
    np.testing.assert_allclose(array(result.quantized), before[codes], atol=1e-6)
    error = np.square(z - before[codes]).mean()
    np.testing.assert_allclose(array(result.commitment_loss), error, rtol=1e-5)


@pytest.mark.parametrize("update", ["ema", "gradient"])
def test_usage_fades_by_a_hundredth_a_step(update):
    layer = build(update=update, decay=0.5)
    usage = np.zeros(K)
    for seed in range(4):
        codes = array(layer(latents(3, 2, 2, seed=seed), training=True).codes)
        usage = 0.99 * usage + np.bincount(codes.ravel(), minlength=K)
    np.testing.assert_allclose(array(layer.usage), usage, rtol=1e-5)


def test_learning_by_gradient_keeps_no_averages_and_leaves_the_codebook():
    layer = build(update="gradient")
    before = array(layer.codebook)
    layer(latents(2, 3, 5), training=True)
    np.testing.assert_array_equal(array(layer.codebook), before)
    assert [weight.name for weight in layer.trainable_weights] == ["codebook"]
    assert [weight.name for weight in layer.non_trainable_weights] == ["usage"]


def test_learning_by_averages_has_no_trainable_weight():
    layer = build()
    assert layer.trainable_weights == []
    names = {weight.name for weight in layer.non_trainable_weights}
    assert names == {"codebook", "usage", "ema_counts", "ema_sums"}


@pytest.mark.parametrize("update", ["ema", "gradient"])
@pytest.mark.parametrize("arguments", [{}, {"training": False}])
def test_evaluation_changes_nothing(update, arguments):
    layer = build(update=update, **RESTARTS)
    layer(latents(2, 3, 5), training=True)
    before = state(layer)
    for seed in range(3):
        layer(latents(2, 3, 5, seed=seed), **arguments)
        layer.nearest(latents(1, 1, 1))
    for old, new in zip(before, state(layer), strict=True):
        np.testing.assert_array_equal(new, old)


# Half-precision arithmetic would go wrong in each: 8 bits cannot tell near codes apart, and
# float16 overflows.
HALVES = [("bfloat16", 10.0), ("float16", 100.0)]


@pytest.mark.parametrize(("dtype", "offset"), HALVES)
def test_distances_are_float32_whatever_the_dtype_of_the_input(dtype, offset):
    codebook = np.float32(offset + numbers(1).normal(size=(32, 8)))
    z = ops.cast(offset + numbers(2).normal(size=(4, 8, 8, 8)), dtype)
    rounded = np.float32(array(ops.cast(z, "float32")))
    clear = distance_margin(rounded, codebook) > 0.2
    assert clear.mean() > 0.7
    expected = nearest_codes(rounded, codebook)[clear]

    in_half = squared_distances(ops.reshape(z, (-1, 8)), ops.cast(codebook, dtype))
    flipped = array(ops.argmin(in_half, axis=1)).reshape(clear.shape)[clear] != expected
    assert flipped.mean() > 0.1

    layer = build(codebook, num_codes=32, code_dim=8)
    for result in (layer(z), layer(rounded)):
        np.testing.assert_array_equal(array(result.codes)[clear], expected)
        assert keras.backend.standardize_dtype(result.quantized.dtype) == "float32"
    np.testing.assert_array_equal(array(layer.nearest(z))[clear], expected)


@pytest.mark.parametrize(("dtype", "offset"), HALVES)
def test_averages_are_float32_whatever_the_dtype_of_the_input(dtype, offset):
    codebook = np.float32(offset + numbers(1).normal(size=(K, D)))
    z = ops.cast(offset + numbers(2).normal(size=(2, 3, 4, D)), dtype)
    half, full = build(codebook), build(codebook)
    half(z, training=True)
    full(ops.cast(z, "float32"), training=True)
    for one, other in zip(state(half), state(full), strict=True):
        np.testing.assert_array_equal(one, other)
    with np.errstate(over="raise"):
        codes = array(half.nearest(z))
    assert np.isfinite(array(half.codebook)).all() and codes.max() < K


@pytest.mark.parametrize("policy", ["mixed_bfloat16", "mixed_float16"])
def test_is_float32_under_a_mixed_policy(policy):
    keras.config.set_dtype_policy(policy)
    try:
        layer = build()
    finally:
        keras.config.set_dtype_policy("float32")
    assert layer.compute_dtype == "float32"
    assert {weight.dtype for weight in layer.weights} == {"float32"}
    result = layer(latents(1, 2, 2))
    expected = build()(latents(1, 2, 2))
    np.testing.assert_array_equal(array(result.quantized), array(expected.quantized))
    # Nor can an argument make it half.
    assert VectorQuantizer(K, D, dtype=policy).compute_dtype == "float32"


def test_refuses_another_last_axis():
    with pytest.raises(ValueError, match="code_dim is 4, its input has 5"):
        VectorQuantizer(K, D)(np.zeros((1, 2, 2, 5), "float32"))


def test_refuses_an_unknown_update():
    with pytest.raises(ValueError, match="choose 'ema' or 'gradient'"):
        VectorQuantizer(K, D, "both")


@pytest.mark.parametrize("update", ["ema", "gradient"])
def test_empty_batch(update):
    layer = build(update=update, restart_below=0.0)
    layer(latents(2, 3, 5), training=True)
    codebook, usage = array(layer.codebook), array(layer.usage)
    result = layer(latents(0, 3, 5), training=True)
    assert result.codes.shape == (0, 3, 5) and result.quantized.shape == (0, 3, 5, D)
    np.testing.assert_array_equal(array(layer.codebook), codebook)
    np.testing.assert_allclose(array(layer.usage), 0.99 * usage, rtol=1e-6)


def test_config_and_weights_make_the_same_layer():
    layer = build(update="ema", decay=0.7, **RESTARTS)
    layer(latents(2, 3, 5), training=True)
    twin = keras.saving.deserialize_keras_object(keras.saving.serialize_keras_object(layer))
    assert isinstance(twin, VectorQuantizer) and twin.get_config() == layer.get_config()
    assert (twin.num_codes, twin.code_dim, twin.update, twin.decay) == (K, D, "ema", 0.7)
    twin.set_weights(layer.get_weights())
    # Both go on alike: the averages are part of the weights.
    for copy in (layer, twin):
        copy(latents(2, 3, 5, seed=1), training=True)
    for one, other in zip(state(layer), state(twin), strict=True):
        np.testing.assert_array_equal(one, other)


RESTARTS = {"restart_below": 0.2}


def test_restarts_move_neglected_codes_onto_vectors_of_the_batch():
    codebook = np.float32(100 + numbers(1).normal(size=(K, D)))
    codebook[:3] = [[-3.0] * D, [0.0] * D, [3.0] * D]
    layer, without = build(codebook, **RESTARTS), build(codebook)
    z = np.concatenate([latents(1, 8, 1) + offset for offset in (-3, 0, 3)]).astype("float32")
    for copy in (layer, without):
        copy(z, training=True)
    chosen = array(without.usage) > 0
    assert chosen.sum() == 3
    # What is in use moves as it would without restarts.
    for name in ("codebook", "usage", "ema_counts", "ema_sums"):
        np.testing.assert_array_equal(
            array(getattr(layer, name))[chosen], array(getattr(without, name))[chosen]
        )
    moved = array(layer.codebook)[~chosen]
    vectors = z.reshape(-1, D)
    assert all((vectors == code).all(1).any() for code in moved)
    assert len(np.unique(moved, axis=0)) > 1
    # Place, averages and usage together, so that the next step does not take the code back.
    mean_count = array(without.ema_counts).mean()
    np.testing.assert_allclose(array(layer.ema_counts)[~chosen], mean_count, rtol=1e-6)
    np.testing.assert_allclose(array(layer.ema_sums)[~chosen], moved * mean_count, rtol=1e-5)
    np.testing.assert_allclose(array(layer.usage)[~chosen], array(without.usage).mean(), rtol=1e-6)


def test_restarts_measure_neglect_against_the_mean_usage():
    layer = build(**RESTARTS)
    usage = np.full(K, 100.0, "float32")
    usage[:2] = [21.0, 16.0]  # a fifth of the mean usage is 18
    layer.usage.assign(usage)
    layer.codebook.assign(np.float32(50 + np.arange(K)[:, None] * np.ones(D)))
    before = array(layer.codebook)
    layer(np.full((1, 1, 1, D), 1000, "float32"), training=True)
    moved = (array(layer.codebook) != before).any(1)
    # The last code is the nearest, and so moves by its average.
    np.testing.assert_array_equal(np.flatnonzero(moved), [1, K - 1])


def test_no_restarts_in_a_codebook_that_learns_by_gradient():
    layer = build(update="gradient", **RESTARTS)
    before = array(layer.codebook)
    layer(np.zeros((1, 1, 1, D), "float32"), training=True)
    np.testing.assert_array_equal(array(layer.codebook), before)
