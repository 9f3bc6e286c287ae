import keras
import numpy as np
import pytest
import tensorflow as tf
from gradient_fixtures import (
    BETA,
    IMAGES,
    VARIANCE,
    D,
    K,
    build,
    check_by_differences,
    decoder_weights,
    encoder_weights,
    none_reach,
    reconstruction_loss,
    some_reach,
    whole_loss,
)

from vqbeam.vqvae.quantizers import nearest
from vqbeam.vqvae.quantizers.vector import VectorQuantizer

pytestmark = pytest.mark.skipif(
    keras.backend.backend() != "tensorflow", reason="GradientTape is TensorFlow's"
)


@pytest.fixture
def model():
    return build()


def test_reconstruction_reaches_encoder_and_decoder_and_not_the_codebook(model):
    with tf.GradientTape() as tape:
        loss = reconstruction_loss(IMAGES, model(IMAGES)["reconstruction"])
    gradients = tape.gradient(
        loss,
        {
            "encoder": encoder_weights(model),
            "decoder": decoder_weights(model),
            "codebook": [model.quantizer.codebook.value],
        },
    )
    assert some_reach(gradients["encoder"])
    assert some_reach(gradients["decoder"])
    assert none_reach(gradients["codebook"])


def test_gradient_at_z_is_that_at_the_quantized(model):
    with tf.GradientTape() as tape:
        z = model.encoder(IMAGES)
        tape.watch(z)
        quantized = model.quantizer(z).quantized
        loss = reconstruction_loss(IMAGES, model.decoder(quantized))
    at_z, at_quantized = tape.gradient(loss, [z, quantized])
    assert np.abs(at_quantized.numpy()).max() > 0
    np.testing.assert_array_equal(at_z, at_quantized)


def test_straight_through_is_the_identity_to_a_gradient():
    z = tf.constant(np.random.default_rng(0).normal(size=(2, 3, 4, D)).astype("float32"))
    for update in ("ema", "gradient"):
        layer = VectorQuantizer(K, D, update=update)
        with tf.GradientTape() as tape:
            tape.watch(z)
            quantized = layer(z).quantized
            loss = tf.reduce_sum(tf.sin(quantized) * tf.cos(z[0, 0, 0, 0] * 0 + 2.0))
        np.testing.assert_allclose(
            tape.gradient(loss, z), np.cos(quantized) * np.cos(2.0), rtol=1e-5
        )


def test_without_straight_through_the_encoder_gets_nothing(model):
    with tf.GradientTape() as tape:
        z = model.encoder(IMAGES)
        tape.watch(z)
        quantized = model.quantizer.decode_codes(model.quantizer.encode(z))
        loss = reconstruction_loss(IMAGES, model.decoder(quantized))
    gradients = tape.gradient(
        loss, {"encoder": encoder_weights(model), "z": [z], "decoder": decoder_weights(model)}
    )
    assert none_reach(gradients["encoder"]) and none_reach(gradients["z"])
    assert some_reach(gradients["decoder"])


@pytest.mark.parametrize("update", ["ema", "gradient"])
def test_commitment_reaches_only_the_encoder(update):
    model = build(update)
    with tf.GradientTape() as tape:
        tape.watch(model.quantizer.codebook.value)
        loss = model(IMAGES)["losses"]["commitment"]
    gradients = tape.gradient(
        loss,
        {
            "encoder": encoder_weights(model),
            "decoder": decoder_weights(model),
            "codebook": [model.quantizer.codebook.value],
        },
    )
    assert some_reach(gradients["encoder"])
    assert none_reach(gradients["decoder"]) and none_reach(gradients["codebook"])


def test_codebook_loss_reaches_only_the_codebook(model):
    with tf.GradientTape() as tape:
        z = model.encoder(IMAGES)
        tape.watch(z)
        loss = model.quantizer(z).losses["codebook"]
    gradients = tape.gradient(
        loss,
        {
            "encoder": encoder_weights(model),
            "z": [z],
            "decoder": decoder_weights(model),
            "codebook": [model.quantizer.codebook.value],
        },
    )
    assert some_reach(gradients["codebook"])
    for other in ("encoder", "z", "decoder"):
        assert none_reach(gradients[other])


def test_distances_contribute_no_gradient(model, monkeypatch):
    seen = []
    plain = nearest._best_of_block

    def remembered(rows, codes):
        assert rows.shape[0] == 5 * 2 * 2 and codes.shape[-1] >= K
        seen.append(plain(rows, codes))
        return seen[-1]

    monkeypatch.setattr(nearest, "_best_of_block", remembered)
    with tf.GradientTape(persistent=True) as tape:
        z = model.encoder(IMAGES)
        tape.watch(z)
        codes = model.quantizer(z).codes
        total = tf.reduce_sum(tf.concat([scores for scores, _ in seen], 0))
        chosen = tf.reduce_sum(tf.cast(codes, "float32"))
    assert len(seen) == 1 and np.isfinite(total)
    sources = [z, model.quantizer.codebook.value, *encoder_weights(model)]
    assert none_reach(tape.gradient(total, sources))
    assert none_reach(tape.gradient(chosen, sources))


def test_codebook_gradient_holds_the_chosen_codes_alone(model):
    for loss in ("codebook", "whole"):
        with tf.GradientTape() as tape:
            result = model(IMAGES)
            value = result["losses"]["codebook"] if loss == "codebook" else whole_loss(model)
        gradient = tape.gradient(value, model.quantizer.codebook.value)
        assert isinstance(gradient, tf.IndexedSlices)
        np.testing.assert_array_equal(gradient.indices, result["codes"].numpy().ravel())
        assert tuple(gradient.dense_shape.numpy()) == (K, D)


def test_sgd_changes_exactly_the_rows_of_the_chosen_codes(model):
    codebook = model.quantizer.codebook
    # A code so far off that nothing chooses it.
    codebook.assign(np.concatenate([codebook.numpy()[:-1], np.full((1, D), 1e3)]))
    before = codebook.numpy()
    with tf.GradientTape() as tape:
        result = model(IMAGES)
    gradient = tape.gradient(result["losses"]["codebook"], codebook.value)
    keras.optimizers.SGD(0.5).apply([gradient], [codebook])
    codes = result["codes"].numpy()
    changed = np.flatnonzero((codebook.numpy() != before).any(axis=1))
    np.testing.assert_array_equal(changed, np.unique(codes))
    assert 1 < len(changed) < K
    dense = tf.convert_to_tensor(gradient).numpy()
    np.testing.assert_allclose(codebook.numpy(), before - 0.5 * dense, rtol=1e-5)


def test_momentum_moves_codes_that_only_the_step_before_has_chosen(model):
    codebook = model.quantizer.codebook
    optimizer = keras.optimizers.Adam(1e-4)  # so small that the second batch keeps its codes
    for images in (IMAGES, IMAGES[:1]):
        before = codebook.numpy()
        with tf.GradientTape() as tape:
            result = model(images)
        gradient = tape.gradient(result["losses"]["codebook"], codebook.value)
        optimizer.apply([gradient], [codebook])
    chosen = np.isin(np.arange(K), result["codes"].numpy())
    moved = (codebook.numpy() != before).any(axis=1)
    assert (moved & ~chosen).any() and moved[chosen].all()


def test_a_compiled_training_step_changes_exactly_those_rows(model):
    codebook = model.quantizer.codebook
    codebook.assign(np.concatenate([codebook.numpy()[:-1], np.full((1, D), 1e3)]))
    before, codes = codebook.numpy(), model(IMAGES)["codes"].numpy()
    model.compile(keras.optimizers.SGD(0.1))
    model.train_on_batch(IMAGES)
    changed = np.flatnonzero((codebook.numpy() != before).any(axis=1))
    np.testing.assert_array_equal(changed, np.unique(codes))


def test_averages_give_the_codebook_no_gradient():
    model = build("ema")
    codebook = model.quantizer.codebook
    assert not codebook.trainable
    assert all(codebook is not variable for variable in model.trainable_variables)
    for training in (False, True):
        with tf.GradientTape() as tape:
            tape.watch(codebook.value)
            loss = whole_loss(model, training)
        gradients = tape.gradient(loss, [codebook.value, *encoder_weights(model)])
        assert gradients[0] is None
        assert some_reach(gradients[1:])


def test_codebook_gradient_in_closed_form(model):
    codebook = model.quantizer.codebook
    z = model.encoder(IMAGES)
    with tf.GradientTape() as tape:
        result = model.quantizer(z)
    gradient = tape.gradient(result.losses["codebook"], codebook.value)
    gradient = tf.convert_to_tensor(gradient).numpy()
    vectors, codes = z.numpy().reshape(-1, D), result.codes.numpy().ravel()
    expected = np.zeros((K, D))
    for vector, code in zip(vectors, codes, strict=True):
        expected[code] += 2 / vectors.size * (codebook.numpy()[code] - vector)
    np.testing.assert_allclose(gradient, expected, rtol=1e-4, atol=1e-8)

    def loss():
        return tf.reduce_mean(tf.square(vectors - tf.gather(codebook.value, codes)))

    check_by_differences([codebook.value], [gradient * 100], lambda: 100 * loss(), step=1e-2)


def test_commitment_gradient_in_closed_form(model):
    z = model.encoder(IMAGES)
    with tf.GradientTape() as tape:
        tape.watch(z)
        result = model.quantizer(z)
    gradient = tape.gradient(result.losses["commitment"], z).numpy()
    chosen = model.quantizer.codebook.numpy()[result.codes.numpy()]
    expected = BETA * 2 / z.numpy().size * (z - chosen)
    np.testing.assert_allclose(gradient, expected, rtol=1e-4, atol=1e-8)


def test_commitment_gradient_of_the_encoder_by_differences(model):
    with tf.GradientTape() as tape:
        result = model(IMAGES)
        loss = 100 / BETA * result["losses"]["commitment"]
    gradients = tape.gradient(loss, encoder_weights(model))
    chosen = model.quantizer.decode_codes(result["codes"])

    def with_codes_held():
        return 100 * tf.reduce_mean(tf.square(model.encoder(IMAGES) - chosen))

    check_by_differences(encoder_weights(model), gradients, with_codes_held)


def test_reconstruction_gradient_by_differences(model):
    with tf.GradientTape() as tape:
        loss = reconstruction_loss(IMAGES, model(IMAGES)["reconstruction"])
    gradients = tape.gradient(loss, [encoder_weights(model), decoder_weights(model)])
    z = model.encoder(IMAGES)
    gap = model.quantizer(z).quantized - z

    def straight_through_held():
        # What z + sg(e − z) means: the gap between the two is a constant.
        return reconstruction_loss(IMAGES, model.decoder(model.encoder(IMAGES) + gap))

    check_by_differences(encoder_weights(model), gradients[0], straight_through_held)
    check_by_differences(decoder_weights(model), gradients[1], straight_through_held)


@pytest.mark.parametrize("update", ["ema", "gradient"])
def test_whole_loss_weighs_the_parts(update):
    model = build(update)
    with tf.GradientTape(persistent=True) as tape:
        z = model.encoder(IMAGES)
        tape.watch(z)
        result = model.quantizer(z)
        reconstruction = model.decoder(result.quantized)
        parts = {
            "reconstruction": reconstruction,
            "codes": result.codes,
            "losses": result.losses,
            "statistics": result.statistics,
        }
        loss = model.compute_loss(x=IMAGES, y_pred=parts)
    at_z, at_quantized = tape.gradient(loss, [z, result.quantized])
    chosen = model.quantizer.codebook.numpy()[result.codes.numpy()]
    commitment = BETA * 2 / z.numpy().size * (z.numpy() - chosen)
    np.testing.assert_allclose(at_z, at_quantized + commitment, rtol=1e-4, atol=1e-7)
    at_pixels = tape.gradient(loss, reconstruction)
    expected = 2 / IMAGES.size / VARIANCE * (reconstruction - IMAGES)
    np.testing.assert_allclose(at_pixels, expected, rtol=1e-4, atol=1e-8)
