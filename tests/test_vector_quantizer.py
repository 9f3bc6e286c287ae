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
    numbers,
    state,
)

from vqbeam.vqvae.metrics import perplexity
from vqbeam.vqvae.quantizers.vector import VectorQuantizer

K, D = 9, 4
RESTARTS = {"restart_below": 0.2}
ON_JAX_TOO = pytest.mark.backend
BOTH_UPDATES = pytest.mark.parametrize(
    "update", [pytest.param("ema", marks=ON_JAX_TOO), "gradient"]
)


def build(codebook=None, **changes):
    layer = built(VectorQuantizer(**({"num_codes": K, "code_dim": D} | changes)))
    if codebook is not None:
        layer.codebook.assign(np.float32(codebook))
    return layer


def unit(vectors):
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)


def entropy_loss(z, codebook):
    """E[H(p)] − H(E[p]), where p falls with the distance in units of that to the nearest code."""
    distances = np.square(z.reshape(-1, 1, z.shape[-1]) - codebook).sum(-1)
    p = np.exp(-distances / distances.min(1).mean())
    p /= p.sum(1, keepdims=True)
    mean = p.mean(0)
    return np.sum(mean * np.log(mean)) - np.sum(p * np.log(p), axis=1).mean()


def in_numpy(layer, z):
    z, codebook = np.float64(z), np.float64(array(layer.codebook))
    if layer.lookup == "cosine":
        z, codebook = unit(z), unit(codebook)
    codes = nearest_codes(z, codebook)
    error = np.square(z - codebook[codes]).mean()
    losses = {"commitment": layer.commitment * error}
    if layer.update == "gradient":
        losses["codebook"] = error
    if layer.entropy:
        losses["entropy"] = layer.entropy * entropy_loss(z, codebook)
    return codes, codebook[codes], losses, error


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"lookup": "cosine", "estimator": "rotation", "decay": 0.5},
        pytest.param(
            {"update": "gradient", "commitment": 0.7, "entropy": 0.3, **RESTARTS}, marks=ON_JAX_TOO
        ),
    ],
    ids=["ema", "cosine", "gradient"],
)
def test_all_that_holds_for_quantizers(changes):
    check_quantizer(lambda: VectorQuantizer(K, D, **changes), in_numpy)


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


@pytest.mark.parametrize("decay", [pytest.param(0.5, marks=ON_JAX_TOO), 0.0])
def test_moving_averages_over_several_steps(decay):
    layer = build(decay=decay)
    # Large enough that smoothing which leaks into the averages would show.
    layer.epsilon = 0.3
    expected = NumpyAverages(array(layer.codebook), decay, layer.epsilon)
    for seed in range(6):
        z = latents(2, 3, 2, D, seed=seed)
        layer(z, training=True)
        expected.step(z)
        np.testing.assert_allclose(array(layer.ema_counts), expected.counts, rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(array(layer.ema_sums), expected.sums, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(array(layer.codebook), expected.codebook, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(array(layer.usage), expected.usage, rtol=1e-5)


def test_smoothing_is_slight():
    assert build().epsilon == 1e-5


@pytest.mark.backend
def test_averages_of_directions_where_the_angle_decides():
    layer = build(lookup="cosine")
    z = latents(2, 3, 5, D)
    codes = array(layer(100 * z, training=True).codes)
    for code in np.unique(codes):
        mean = unit(z)[codes == code].mean(0)
        np.testing.assert_allclose(array(layer.codebook)[code], mean, rtol=2e-3, atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(array(layer.vectors()), axis=1), 1, rtol=1e-5)


def test_the_length_of_z_does_not_count_where_the_angle_decides():
    layer = build(lookup="cosine")
    z = latents(4, 5, D)
    np.testing.assert_array_equal(array(layer.encode(z)), array(layer.encode(1e3 * z)))
    assert (array(layer.encode(z)) != array(build().encode(z))).any()
    assert np.isfinite(array(layer(np.zeros((1, 1, D), "float32")).quantized)).all()
    found = gradient(lambda x: ops.sum(layer(x).quantized[..., 0]), np.zeros((1, 1, D), "float32"))
    assert np.isfinite(found).all()


def test_first_step_takes_each_chosen_code_to_the_mean_of_its_vectors():
    layer = build()
    before = array(layer.codebook)
    z = latents(2, 3, 5, D)
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
    for _ in range(30):
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
    z = latents(2, 3, 5, D)
    result = layer(z, training=True)
    assert np.abs(array(layer.codebook) - before).max() > 0.1
    codes = array(result.codes)
    np.testing.assert_array_equal(codes, nearest_codes(z, before))
    np.testing.assert_allclose(array(result.quantized), before[codes], atol=1e-6)
    error = np.square(z - before[codes]).mean()
    np.testing.assert_allclose(array(result.losses["commitment"]), 0.25 * error, rtol=1e-5)


def test_usage_fades_by_a_hundredth_a_step():
    layer = build(update="gradient")
    usage = np.zeros(K)
    for seed in range(4):
        codes = array(layer(latents(3, 2, 2, D, seed=seed), training=True).codes)
        usage = 0.99 * usage + np.bincount(codes.ravel(), minlength=K)
    np.testing.assert_allclose(array(layer.usage), usage, rtol=1e-5)


def test_learning_by_gradient_keeps_no_averages_and_leaves_the_codebook():
    layer = build(update="gradient")
    before = array(layer.codebook)
    layer(latents(2, 3, 5, D), training=True)
    np.testing.assert_array_equal(array(layer.codebook), before)
    assert [weight.name for weight in layer.trainable_weights] == ["codebook"]
    assert [weight.name for weight in layer.non_trainable_weights] == ["usage"]


def test_learning_by_averages_has_no_trainable_weight():
    layer = build()
    assert layer.trainable_weights == []
    names = {weight.name for weight in layer.non_trainable_weights}
    assert names == {"codebook", "usage", "ema_counts", "ema_sums"}


# Half-precision arithmetic would go wrong in each: 8 bits cannot tell near codes apart, and
# float16 overflows.
@pytest.mark.parametrize(
    ("dtype", "offset"), [pytest.param("bfloat16", 10.0, marks=ON_JAX_TOO), ("float16", 100.0)]
)
def test_distances_are_float32_whatever_the_dtype_of_the_input(dtype, offset):
    codebook = np.float32(offset + numbers(1).normal(size=(32, 8)))
    z = ops.cast(offset + numbers(2).normal(size=(4, 8, 8, 8)), dtype)
    rounded = np.float64(array(ops.cast(z, "float32")))
    distances = np.square(rounded[..., None, :] - codebook).sum(-1)
    first, second = np.moveaxis(np.sort(distances, axis=-1)[..., :2], -1, 0)
    clear = second - first > 0.2
    assert clear.mean() > 0.7
    found = array(build(codebook, num_codes=32, code_dim=8)(z).codes)
    np.testing.assert_array_equal(found[clear], distances.argmin(-1)[clear])


@pytest.mark.parametrize("name", ["lookup", "update", "estimator"])
def test_refuses_an_unknown_choice(name):
    with pytest.raises(ValueError, match=f"{name} is 'both'; choose one of '"):
        VectorQuantizer(K, D, **{name: "both"})


@BOTH_UPDATES
def test_a_training_step_of_an_empty_batch(update):
    layer = build(update=update)
    layer(latents(2, 3, 5, D), training=True)
    codebook, usage = array(layer.codebook), array(layer.usage)
    layer(latents(0, 3, 5, D), training=True)
    np.testing.assert_array_equal(array(layer.codebook), codebook)
    np.testing.assert_allclose(array(layer.usage), 0.99 * usage, rtol=1e-6)


def clustered():
    """Most codes far away, three each near a third of the vectors."""
    codebook = np.float32(100 + numbers(1).normal(size=(K, D)))
    codebook[:3] = [[-3.0] * D, [0.0] * D, [3.0] * D]
    z = np.concatenate([latents(1, 8, 1, D) + offset for offset in (-3, 0, 3)])
    return codebook, z.astype("float32")


@BOTH_UPDATES
def test_restarts_move_neglected_codes_onto_vectors_of_the_batch(update):
    codebook, z = clustered()
    layer, without = (build(codebook, update=update, **changes) for changes in (RESTARTS, {}))
    for copy in (layer, without):
        copy(z, training=True)
    chosen = array(without.usage) > 0
    assert chosen.sum() == 3
    # What is in use moves as it would without restarts.
    vectors = array(layer.vectors())
    np.testing.assert_array_equal(vectors[chosen], array(without.vectors())[chosen])
    np.testing.assert_array_equal(array(layer.usage)[chosen], array(without.usage)[chosen])
    moved = vectors[~chosen]
    # Up to the rounding of a difference that is added again.
    distances = np.abs(z.reshape(-1, 1, D) - moved).max(-1).min(0)
    assert distances.max() < (1e-4 if update == "gradient" else 1e-9)
    assert len(np.unique(moved.round(3), axis=0)) > 1
    np.testing.assert_allclose(array(layer.usage)[~chosen], array(without.usage).mean(), rtol=1e-6)
    np.testing.assert_array_equal(array(layer.decode_codes(np.arange(K))), vectors)


def test_restarts_move_averages_along():
    codebook, z = clustered()
    layer, without = build(codebook, **RESTARTS), build(codebook)
    for copy in (layer, without):
        copy(z, training=True)
    chosen = array(without.usage) > 0
    for name in ("ema_counts", "ema_sums"):
        np.testing.assert_array_equal(
            array(getattr(layer, name))[chosen], array(getattr(without, name))[chosen]
        )
    # So that the next step does not take the code back.
    mean_count = array(without.ema_counts).mean()
    moved = array(layer.codebook)[~chosen]
    np.testing.assert_allclose(array(layer.ema_counts)[~chosen], mean_count, rtol=1e-6)
    np.testing.assert_allclose(array(layer.ema_sums)[~chosen], moved * mean_count, rtol=1e-5)


@pytest.mark.backend
def test_restarts_of_a_trainable_codebook_are_added_to_it():
    codebook, z = clustered()
    layer = build(codebook, update="gradient", **RESTARTS)
    layer(z, training=True)
    np.testing.assert_array_equal(array(layer.codebook), codebook)
    assert (np.abs(array(layer.moves)).max(1) > 0).sum() == K - 3
    # The restarted codes are chosen, and learn on from their new places.
    first = array(layer.vectors())
    assert len(np.unique(array(layer.encode(z)))) > 3
    layer.codebook.assign(codebook + 1)
    np.testing.assert_allclose(array(layer.vectors()), first + 1, atol=1e-4)
    np.testing.assert_allclose(array(layer.decode_codes(np.arange(K))), first + 1, atol=1e-4)


@pytest.mark.parametrize("update", ["ema", "gradient"])
def test_restarts_measure_neglect_against_the_mean_usage(update):
    layer = build(update=update, **RESTARTS)
    usage = np.full(K, 100.0, "float32")
    usage[:2] = [21.0, 16.0]  # a fifth of the mean usage is 18
    layer.usage.assign(usage)
    layer.codebook.assign(np.float32(50 + np.arange(K)[:, None] * np.ones(D)))
    before = array(layer.vectors())
    layer(np.full((1, 1, 1, D), 1000, "float32"), training=True)
    moved = (array(layer.vectors()) != before).any(1)
    # The last code is the nearest, and so moves by its average where there is one.
    np.testing.assert_array_equal(np.flatnonzero(moved), [1, K - 1][: 2 if update == "ema" else 1])


def test_initialize_at_random_changes_nothing():
    layer = build()
    before = state(layer)
    layer.initialize(latents(50, D), "random", seed=0)
    for old, new in zip(before, state(layer), strict=True):
        np.testing.assert_array_equal(old, new)


@pytest.mark.parametrize(
    ("method", "lookup"), [("data", "l2"), pytest.param("kmeans", "cosine", marks=ON_JAX_TOO)]
)
def test_initialize_places_codebook_averages_and_usage(method, lookup):
    layer = build(lookup=lookup)
    vectors = latents(60, D, seed=4) + 2
    layer.initialize(ops.convert_to_tensor(vectors), method, seed=0)
    known = unit(vectors) if lookup == "cosine" else vectors
    codebook = array(layer.codebook)
    is_vector = np.abs(known[:, None] - codebook).max(-1).min(0) < 1e-6
    assert is_vector.all() == (method == "data")
    counts = np.bincount(nearest_codes(known, codebook), minlength=K)
    np.testing.assert_array_equal(array(layer.usage), counts)
    np.testing.assert_array_equal(array(layer.ema_counts), counts)
    np.testing.assert_allclose(array(layer.ema_sums), codebook * counts[:, None], rtol=1e-6)
    # The first step moves codes by a hundredth, and does not throw them elsewhere.
    layer(vectors[None, None], training=True)
    assert np.abs(array(layer.codebook) - codebook).max() < 0.02


def test_initialize_a_trainable_codebook():
    layer = build(update="gradient", **RESTARTS)
    vectors = latents(60, D, seed=4) + 2
    layer.initialize(ops.convert_to_tensor(vectors), "kmeans", seed=0)
    error = np.square(vectors - array(layer.decode_codes(layer.encode(vectors)))).mean()
    assert error < 0.6 * vectors.var()
    assert array(layer.usage).sum() == 60


@pytest.mark.backend
def test_balance_adds_a_penalty_for_usage_to_the_squared_distances():
    balance, error = 0.4, 2.0
    layer = build(balance=balance)
    usage = np.float32([50, 1, 3, 8, 0, 20, 5, 9, 2])
    layer.usage.assign(usage)
    layer.mean_error.assign(error)
    z = latents(40, 5, D)
    share = np.maximum(np.float64(usage) / usage.mean(), layer.smallest_share)
    distances = np.square(z[..., None, :] - np.float64(array(layer.codebook))).sum(-1)
    costs = distances + balance * error * np.log(share)
    found = array(layer.encode(z))
    np.testing.assert_array_equal(found, costs.argmin(-1))
    np.testing.assert_array_equal(array(layer(z).codes), found)
    assert (found != distances.argmin(-1)).mean() > 0.1
    # What is chosen is handed on as it is: the penalty is no part of the vectors or the losses.
    chosen = array(layer.codebook)[found]
    np.testing.assert_allclose(array(layer(z).quantized), chosen, atol=1e-6)
    np.testing.assert_allclose(
        array(layer(z).losses["commitment"]), 0.25 * np.square(z - chosen).mean(), rtol=1e-5
    )


def test_balance_follows_the_error_of_the_codes_chosen():
    layer = build(balance=0.4, decay=0.0)
    expected = 0.0
    for seed in range(3):
        z = latents(6, 5, D, seed=seed)
        chosen = array(layer.codebook)[array(layer.encode(z))]
        expected = 0.99 * expected + 0.01 * np.square(z - chosen).sum(-1).mean()
        layer(z, training=True)
        np.testing.assert_allclose(array(layer.mean_error), expected, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.usefixtures("compiled")
def test_balance_evens_out_the_use_of_codes():
    import tensorflow as tf

    # Vectors crowd at the origin, and few codes lie there.
    z = tf.constant(latents(600, D) ** 3)

    def trained(balance):
        layer = build(balance=balance)
        step = tf.function(lambda: layer(z, training=True).codes, autograph=False)
        for _ in range(100):
            step()
        return layer

    perplexities = []
    for balance in (0.0, 0.5, 1.0):
        layer = trained(balance)
        perplexities.append(perplexity(np.bincount(array(layer.encode(z)), minlength=K)))
    assert perplexities[1] > 1.1 * perplexities[0] and perplexities[2] > perplexities[1]
