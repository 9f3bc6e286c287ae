import json
import math

import keras
import numpy as np
import pytest
from keras import ops

from vqbeam.prior.block import BASE, Block, rotary_tables, rotate
from vqbeam.prior.transformer import CodePrior, LevelHead
from vqbeam.vqvae.layout import CodeLayout
from vqbeam.vqvae.storage.records import UNTUNED

# A grid of one code has nothing to attend to but itself.
pytestmark = pytest.mark.filterwarnings("ignore:You are using a softmax over axis")

K, GRID, LABELS = 11, (3, 4), 5
T = math.prod(GRID)
FLAT = CodeLayout(K, (GRID,))
DEEP = CodeLayout(K, ((2, 2),), depth=3)
PYRAMID = CodeLayout(K, ((1, 2), (2, 4)))
ON_JAX_TOO = pytest.mark.backend


def build(perturbed=True, **changes):
    """A small prior; perturbed, its head gives every code a logit of its own."""
    keras.utils.set_random_seed(0)
    arguments = dict(layout=FLAT, num_labels=LABELS, layers=2, width=16, heads=2)
    model = CodePrior(**(arguments | changes))
    if perturbed:
        model.head.kernel.assign(np.random.default_rng(0).normal(size=model.head.kernel.shape))
    return model


def examples(size=4, seed=0, layout=FLAT):
    random = np.random.default_rng(seed)
    codes = random.integers(K, size=(size, *layout.shape), dtype="int32")
    return {"codes": codes, "labels": random.integers(LABELS, size=size, dtype="int32")}


def logits(model, inputs):
    return ops.convert_to_numpy(model(inputs))


def compiled(model, learning_rate=1e-2):
    model.compile(keras.optimizers.Adam(learning_rate))
    return model


def batches(size=32, batch_size=16, layout=FLAT):
    import tensorflow as tf

    inputs = examples(size, layout=layout)
    return tf.data.Dataset.from_tensor_slices(inputs).batch(batch_size).with_options(UNTUNED)


def test_an_untrained_model_gives_all_codes_the_logit_zero():
    found = logits(build(perturbed=False), examples())
    np.testing.assert_array_equal(found, np.zeros((4, T, K)))


@pytest.mark.backend
def test_loss_is_mean_nats_per_code():
    model, inputs = compiled(build(dropout=0.5, layout=DEEP)), examples(32, layout=DEEP)
    scores = logits(model, inputs).astype("float64")
    log_probabilities = scores - np.log(np.exp(scores).sum(-1, keepdims=True))
    codes = inputs["codes"].reshape(32, -1, 1)
    expected = -np.take_along_axis(log_probabilities, codes, -1).mean()
    found = model.evaluate(batches(layout=DEEP), verbose=0)
    assert found == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("layout", [pytest.param(FLAT, marks=ON_JAX_TOO), DEEP, PYRAMID])
def test_a_code_changes_only_later_logits(layout):
    model, inputs = build(layout=layout), examples(layout=layout)
    before = logits(model, inputs)
    # One code of each image.
    places = np.array([0, 1, -2, -1]) % layout.length
    sequences, rows = inputs["codes"].reshape(4, -1), np.arange(4)
    sequences[rows, places] = (sequences[rows, places] + 1) % K
    change = np.abs(logits(model, inputs) - before).max(-1)
    for row, t in enumerate(places):
        assert np.all(change[row, : t + 1] == 0) and np.all(change[row, t + 1 :] > 1e-5)


def test_first_logits_depend_on_the_label_only():
    model = build()
    inputs = examples(LABELS) | {"labels": np.arange(LABELS)}
    first = logits(model, inputs)[:, 0]
    np.testing.assert_allclose(
        logits(model, inputs | {"codes": inputs["codes"] * 0})[:, 0], first, atol=1e-6
    )
    assert len(np.unique(first.round(4), axis=0)) == LABELS


def test_missing_label_is_the_null_class():
    model, inputs = build(), examples()
    assert model.null_label == LABELS
    missing, null = (logits(model, inputs | {"labels": np.full(4, n)}) for n in (-1, LABELS))
    np.testing.assert_array_equal(missing, null)


@pytest.mark.backend
def test_the_token_of_attributes_in_numpy():
    model = build(conditioning="attributes", num_labels=3)
    table = ops.convert_to_numpy(model.label_embedding.embeddings.value)
    assert len(np.unique(table, axis=0)) == len(table) == 5
    attributes = np.array([[0, 0, 0], [1, 0, 1], [0, 1, 0], [-1, -1, -1]])
    *of_each, null, shared = table
    expected = [shared, of_each[0] + of_each[2] + shared, of_each[1] + shared, null]
    found = ops.convert_to_numpy(model.embed_labels(attributes))
    assert found.shape == (4, 1, 16)
    np.testing.assert_allclose(found[:, 0], expected, atol=1e-6)
    assert model.null_label == -1
    first = logits(model, {"codes": np.zeros((4, *GRID), "int32"), "labels": attributes})[:, 0]
    assert len(np.unique(first.round(4), axis=0)) == 4


def test_attributes_are_learned_where_they_are_on_and_stored(tmp_path):
    model = compiled(build(conditioning="attributes", num_labels=3))
    table = model.label_embedding.embeddings
    before = np.array(ops.convert_to_numpy(table.value))
    inputs = examples(3) | {"labels": np.array([[1, 0, 0], [0, 0, 1], [1, 0, 1]], "int32")}
    model.train_on_batch(inputs)
    moved = np.any(ops.convert_to_numpy(table.value) != before, axis=1)
    # The second attribute and the row of "not known" are on in no image; the last row is in all.
    np.testing.assert_array_equal(moved, [True, False, True, False, True])
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert loaded.get_config() == model.get_config()
    np.testing.assert_array_equal(logits(loaded, inputs), logits(model, inputs))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("layout", "changes"),
    [
        (FLAT, {}),
        (DEEP, {"kv_heads": 1}),
        pytest.param(PYRAMID, {"kv_heads": 2, "qk_norm": True}, marks=ON_JAX_TOO),
        (CodeLayout(K, ((1, 1),)), {}),
    ],
)
def test_steps_give_the_logits_of_the_whole_sequence(layout, changes):
    model = build(layout=layout, heads=4, **changes)
    random = np.random.default_rng(0)
    inputs = {"codes": random.integers(K, size=(3, *layout.shape)), "labels": np.array([0, 2, 5])}
    whole = logits(model, inputs)
    codes = inputs["codes"].reshape(3, -1)
    x, caches = model.embed_labels(inputs["labels"]), model.empty_caches(3, codes.shape[1])
    for position in range(codes.shape[1]):
        step, caches = model.step(x, caches, position)
        np.testing.assert_allclose(ops.convert_to_numpy(step), whole[:, position], atol=1e-4)
        x = model.embed_codes(codes[:, position : position + 1], position)


@pytest.mark.parametrize("layout", [pytest.param(DEEP, marks=ON_JAX_TOO), PYRAMID])
def test_each_level_has_embeddings_of_its_own(layout):
    model = build(layout=layout)
    table = ops.convert_to_numpy(model.code_embedding.embeddings.value)
    assert len(np.unique(table, axis=0)) == len(table) == layout.levels * K
    codes = examples(layout=layout)["codes"].reshape(4, -1)
    expected = table.reshape(layout.levels, K, -1)[layout.level, codes]
    np.testing.assert_array_equal(ops.convert_to_numpy(model.embed_codes(codes)), expected)
    for first in range(layout.length - 1):
        found = ops.convert_to_numpy(model.embed_codes(codes[:, first : first + 2], first))
        np.testing.assert_array_equal(found, expected[:, first : first + 2])


@pytest.mark.parametrize(
    ("layout", "dtype"),
    [
        (FLAT, "float32"),
        pytest.param(DEEP, "mixed_bfloat16", marks=ON_JAX_TOO),
        (PYRAMID, "float32"),
    ],
)
def test_each_level_has_a_head_of_its_own(layout, dtype):
    head, random = LevelHead(layout, dtype=dtype), np.random.default_rng(0)
    head.build((None, layout.length, 8))
    # Whole numbers, whose products and sums bfloat16 holds as they are.
    head.kernel.assign(random.integers(-1, 2, size=(layout.levels, 8, K)))
    x = random.integers(-3, 4, size=(4, layout.length, 8)).astype("float32")
    kernel = ops.convert_to_numpy(head.kernel.value)
    expected = np.stack([x[:, t] @ kernel[level] for t, level in enumerate(layout.level)], axis=1)
    found = head(x)
    assert keras.backend.standardize_dtype(found.dtype) == head.compute_dtype
    np.testing.assert_array_equal(ops.convert_to_numpy(ops.cast(found, "float32")), expected)
    for t in range(layout.length):
        one = head(x[:, t : t + 1], position=t)
        assert keras.backend.standardize_dtype(one.dtype) == head.compute_dtype
        one = ops.convert_to_numpy(ops.cast(one, "float32"))
        np.testing.assert_array_equal(one, expected[:, t : t + 1])


def test_a_longer_cache_gives_the_same_step():
    model = build()
    x = model.embed_labels(np.array([1]))
    steps = [model.step(x, model.empty_caches(1, length), 0)[0] for length in (1, T, 50)]
    for step in steps[1:]:
        np.testing.assert_allclose(*map(ops.convert_to_numpy, (step, steps[0])), atol=1e-5)


def tables(layout, head_dim):
    return rotary_tables(layout.rows, layout.columns, head_dim)


@pytest.mark.parametrize("layout", [FLAT, pytest.param(PYRAMID, marks=ON_JAX_TOO)])
def test_rotary_tables_against_complex_numbers(layout):
    cos, sin = tables(layout, 8)
    assert cos.shape == (layout.length, 4) and cos.dtype == sin.dtype == np.float32
    x = np.random.default_rng(0).normal(size=(layout.length, 8)).astype("float32")
    rotated = ops.convert_to_numpy(rotate(x, cos, sin))
    np.testing.assert_array_equal(rotated[0], x[0])  # The class token is not rotated.
    for p in range(1, layout.length):
        row, column = layout.rows[p - 1], layout.columns[p - 1]
        angles = np.array([row, row / BASE**0.5, column, column / BASE**0.5])
        turned = (x[p, :4] + 1j * x[p, 4:]) * np.exp(1j * angles)
        expected = np.concatenate([turned.real, turned.imag])
        np.testing.assert_allclose(rotated[p], expected, atol=1e-5)


def test_rotated_products_depend_on_the_distance_only():
    cos, sin = tables(CodeLayout(K, ((4, 4),)), 16)
    random = np.random.default_rng(0)
    query, key = (np.tile(random.normal(size=16).astype("float32"), (16, 1)) for _ in "qk")
    query, key = (ops.convert_to_numpy(rotate(x, cos, sin)) for x in (query, key))
    products = query @ key.T
    # Input 1 + 4·row + column holds the code at (row, column).
    assert products[1 + 4, 1] == pytest.approx(products[1 + 4 * 2 + 1, 1 + 4 + 1], abs=1e-5)
    assert products[1 + 6, 1] == pytest.approx(products[1 + 11, 1 + 5], abs=1e-5)
    assert products[1 + 1, 1] != pytest.approx(products[1 + 4, 1], abs=1e-3)


@pytest.mark.parametrize("qk_norm", [False, pytest.param(True, marks=ON_JAX_TOO)])
def test_block_against_numpy(qk_norm):
    keras.utils.set_random_seed(1)
    layout = CodeLayout(K, ((2, 2),))
    block = Block(layout, width=8, heads=2, qk_norm=qk_norm)
    block.build((1, 4, 8))
    scales = np.random.default_rng(2).uniform(1, 2, size=(2, 4))
    for layer, scale in zip(block.qk_norms, scales, strict=qk_norm):
        layer.scale.assign(scale)
    x = np.random.default_rng(1).normal(size=(1, 4, 8)).astype("float32")
    y = ops.convert_to_numpy(block(x))
    layers = block.qkv, block.attention_output, block.gate_and_up, block.down
    qkv, out, gate_and_up, down = (ops.convert_to_numpy(layer.kernel.value) for layer in layers)

    def norm(v):
        return v / np.sqrt((v**2).mean(-1, keepdims=True) + 1e-6)

    cos, sin = tables(layout, 4)
    query, key, value = np.split(norm(x[0]) @ qkv, 3, axis=-1)
    heads = []
    for head in (slice(0, 4), slice(4, 8)):
        q, k = query[:, head], key[:, head]
        if qk_norm:
            q, k = norm(q) * scales[0], norm(k) * scales[1]
        q, k = (ops.convert_to_numpy(rotate(v.astype("float32"), cos, sin)) for v in (q, k))
        scores = np.where(np.tri(4), np.exp(q @ k.T / 2), 0)
        heads.append(scores / scores.sum(-1, keepdims=True) @ value[:, head])
    middle = x[0] + np.concatenate(heads, -1) @ out
    gate, up = np.split(norm(middle) @ gate_and_up, 2, axis=-1)
    expected = middle + (gate / (1 + np.exp(-gate)) * up) @ down
    np.testing.assert_allclose(y[0], expected, atol=1e-5)


@pytest.mark.parametrize("zero_init", [True, False])
def test_a_block_that_starts_at_zero_returns_its_input(zero_init):
    block = Block(FLAT, width=16, heads=2, zero_init=zero_init)
    x = np.random.default_rng(0).normal(size=(2, T, 16)).astype("float32")
    change = np.abs(ops.convert_to_numpy(block(x)) - x)
    assert (change == 0).all() if zero_init else (change > 0).any(-1).all()


def test_shared_heads_are_repeated_heads():
    keras.utils.set_random_seed(1)
    shared, plain = (Block(FLAT, width=16, heads=4, kv_heads=kv) for kv in (2, 0))
    x = np.random.default_rng(1).normal(size=(3, T, 16)).astype("float32")
    shared(x), plain(x)
    query, key, value = np.split(ops.convert_to_numpy(shared.qkv.kernel.value), [16, 24], axis=1)
    # Each of the two heads of keys and values, 4 wide, serves two heads of queries.
    repeated = [np.repeat(w.reshape(16, 2, 4), 2, axis=1).reshape(16, 16) for w in (key, value)]
    plain.qkv.kernel.assign(np.concatenate([query, *repeated], axis=1))
    for name in ("attention_output", "gate_and_up", "down"):
        getattr(plain, name).kernel.assign(getattr(shared, name).kernel)
    found, expected = (ops.convert_to_numpy(block(x)) for block in (shared, plain))
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert [cache.shape for cache in shared.empty_caches(5, 7)] == [(10, 4, 7), (10, 7, 4)]


@pytest.mark.backend
@pytest.mark.slow
def test_a_few_steps_in_half_precision_lower_the_loss():
    model = compiled(build(perturbed=False, dropout=0.1, layout=DEEP, dtype="mixed_bfloat16"))
    assert keras.backend.standardize_dtype(model(examples(layout=DEEP)).dtype) == "float32"
    data = batches(16, layout=DEEP)
    history = model.fit(data.repeat(30), verbose=0, epochs=2, steps_per_epoch=15, shuffle=False)
    first, last = history.history["loss"]
    assert last < first < math.log(K) + 0.1
    assert model.evaluate(data, verbose=0) < math.log(K) - 0.5


@pytest.mark.slow
@pytest.mark.parametrize(
    ("layout", "dtype"), [(DEEP, "mixed_bfloat16"), (PYRAMID, "float32")], ids=["deep", "pyramid"]
)
def test_a_saved_model_loads_the_same(tmp_path, layout, dtype):
    new = dict(qk_norm=True, zero_init=True)
    model = build(num_labels=0, dropout=0.2, layout=layout, dtype=dtype, **new)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert loaded.get_config() == model.get_config() and loaded.layout == layout
    inputs = examples(layout=layout) | {"labels": np.full(4, -1)}
    np.testing.assert_array_equal(logits(loaded, inputs), logits(model, inputs))


@pytest.mark.backend
def test_attention_of_a_gpu_is_that_of_a_cpu(monkeypatch):
    layer = Block(PYRAMID, width=16, heads=4, kv_heads=2)
    x = np.random.default_rng(0).normal(size=(3, PYRAMID.length, 16)).astype("float32")
    expected = layer(x)
    fused = []
    monkeypatch.setattr("vqbeam.prior.block.on_cpu", lambda: False)
    monkeypatch.setattr(ops, "dot_product_attention", recorded(ops.dot_product_attention, fused))
    np.testing.assert_allclose(np.asarray(layer(x)), np.asarray(expected), rtol=1e-4, atol=1e-5)
    assert len(fused) == (keras.backend.backend() == "jax")


def recorded(function, calls):
    def call(*arguments, **options):
        calls.append(arguments)
        return function(*arguments, **options)

    return call


def trained_with_dropout(remat):
    model = compiled(build(dropout=0.3, layers=1))
    for block in model.blocks:
        block.remat = remat
    model.fit(batches(), shuffle=False, verbose=0)
    return model


@pytest.mark.backend
@pytest.mark.slow
def test_what_is_computed_again_is_the_same():
    plain, again = trained_with_dropout(False), trained_with_dropout(True)
    start = build(dropout=0.3, layers=1)
    for a, b, before in zip(plain.weights, again.weights, start.weights, strict=True):
        a, b, before = map(np.asarray, (a, b, before))
        np.testing.assert_allclose(b, a, rtol=1e-4, atol=1e-5)
        assert np.abs(a - before).max() > 1e-3, "nothing was learned"


@pytest.mark.backend
@pytest.mark.slow
@pytest.mark.skipif(keras.backend.backend() != "jax", reason="JAX shows what is stored")
def test_computing_again_stores_less():
    import jax

    layout = CodeLayout(K, ((16, 16),))
    inputs = examples(8, layout=layout)

    def stored_bytes(remat):
        model = build(layout=layout, layers=3, width=64, heads=4, dropout=0.1)
        for block in model.blocks:
            block.remat = remat

        def loss(weights):
            with keras.StatelessScope(state_mapping=zip(model.weights, weights, strict=True)):
                return model.compute_loss(x=inputs, y_pred=model(inputs, training=True))

        _, backward = jax.vjp(loss, [weight.value for weight in model.weights])
        return sum(array.nbytes for array in jax.tree.leaves(backward))

    assert stored_bytes(True) < 0.2 * stored_bytes(False)


@pytest.mark.parametrize(
    "layer",
    [
        Block(DEEP, width=16, heads=2, kv_heads=1, dropout=0.1),
        Block(FLAT, width=16, heads=2, qk_norm=True, zero_init=True),
        LevelHead(PYRAMID),
    ],
)
def test_layer_config_round_trips(layer):
    twin = type(layer).from_config(json.loads(json.dumps(layer.get_config())))
    assert twin.get_config() == layer.get_config() and twin.layout == layer.layout
