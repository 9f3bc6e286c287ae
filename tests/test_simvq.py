import keras
import numpy as np
import pytest
from keras import ops
from quantizer_checks import array, built, check_quantizer, latents, nearest_codes
from test_vector_quantizer import entropy_loss, unit

from vqbeam.vqvae.quantizers.simvq import SimVQ

K, D = 9, 4


def build(**changes):
    layer = built(SimVQ(K, D, **changes))
    layer.projection.assign(np.eye(D, dtype="float32") + 0.3 * latents(D, D, seed=7))
    return layer


def in_numpy(layer, z):
    z = np.float64(z)
    vectors = np.float64(array(layer.codebook)) @ np.float64(array(layer.projection))
    if layer.lookup == "cosine":
        z, vectors = unit(z), unit(vectors)
    codes = nearest_codes(z, vectors)
    error = np.square(z - vectors[codes]).mean()
    losses = {"codebook": error, "commitment": layer.commitment * error}
    if layer.entropy:
        losses["entropy"] = layer.entropy * entropy_loss(z, vectors)
    return codes, vectors[codes], losses, error


@pytest.mark.backend
@pytest.mark.slow
def test_all_that_holds_for_quantizers():
    changes = {"lookup": "cosine", "estimator": "rotation", "entropy": 0.2}
    check_quantizer(lambda: SimVQ(K, D, **changes), in_numpy)


@pytest.mark.backend
def test_values_with_another_map_than_the_identity():
    layer, z = build(), latents(2, 3, 5, D)
    codes, quantized, losses, _ = in_numpy(layer, z)
    assert (codes != nearest_codes(z, array(layer.codebook))).any()
    result = layer(z)
    np.testing.assert_array_equal(array(result.codes), codes)
    np.testing.assert_allclose(array(result.quantized), quantized, atol=1e-5)
    np.testing.assert_allclose(array(layer.decode_codes(codes)), quantized, atol=1e-5)
    np.testing.assert_allclose(array(result.losses["codebook"]), losses["codebook"], rtol=1e-5)


class Trained(keras.Model):
    """Nothing but the codebook loss of a quantizer."""

    def __init__(self, quantizer):
        super().__init__()
        self.quantizer = quantizer

    def call(self, z, training=False):
        return self.quantizer(z, training=training).losses

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        return y_pred["codebook"]


def test_all_codes_move_together_and_the_fixed_codebook_never():
    layer = build()
    fixed, before = array(layer.codebook), array(layer.vectors())
    assert [weight.name for weight in layer.trainable_weights] == ["projection"]
    # One vector: a plain codebook would move one code.
    z = np.broadcast_to(latents(1, 1, D) + 1, (4, 2, D)).astype("float32")
    model = Trained(layer)
    model.compile(keras.optimizers.SGD(0.1))
    first = float(array(layer(z).losses["codebook"]))
    model.fit(z, batch_size=4, epochs=3, verbose=0)
    np.testing.assert_array_equal(array(layer.codebook), fixed)
    moved = np.abs(array(layer.vectors()) - before).max(1)
    assert (moved > 1e-3).all()
    np.testing.assert_allclose(
        array(layer.vectors()), fixed @ array(layer.projection), rtol=1e-5, atol=1e-6
    )
    assert array(layer(z).losses["codebook"]) < first
    assert array(layer.usage).sum() > 0


@pytest.mark.parametrize("method", ["data", "kmeans"])
def test_initialize_scales_the_codes(method):
    layer = build()
    vectors = 5 * latents(60, D)
    layer.initialize(ops.convert_to_tensor(vectors), method, seed=0)
    found = array(layer.vectors())
    assert np.square(found).mean() == pytest.approx(np.square(vectors).mean(), rel=1e-4)
    np.testing.assert_allclose(unit(found), unit(array(layer.codebook)), atol=1e-5)


def test_initialize_at_random_changes_nothing():
    layer = build()
    before = array(layer.projection)
    layer.initialize(latents(60, D), "random", seed=0)
    np.testing.assert_array_equal(array(layer.projection), before)
