import keras
import numpy as np
import pytest
from keras import ops
from quantizer_checks import array, gradient

from vqbeam.vqvae.finetuning.decoder import PatchDiscriminator


@pytest.fixture(scope="module")
def discriminator():
    keras.utils.set_random_seed(0)
    layer = PatchDiscriminator(width=8)
    layer.build((None, 16, 16, 3))
    return layer


def images(count, seed=0):
    return np.random.default_rng(seed).uniform(-1, 1, (count, 16, 16, 3)).astype("float32")


def test_a_logit_for_each_patch(discriminator):
    logits = array(discriminator(images(5)))
    assert logits.shape == (5, 4, 4, 1) and logits.dtype == np.float32
    # A patch is seen by the logits near it, and by no other: normalisation aside.
    assert len(np.unique(logits)) == 80


@pytest.mark.backend
def test_losses_in_numpy(discriminator):
    originals, copies = images(4), images(4, seed=1)
    real, fake = (array(discriminator(x)) for x in (originals, copies))
    found = {name: array(x) for name, x in discriminator.losses_of(originals, copies).items()}
    hinge = np.maximum(0, 1 - real).mean() + np.maximum(0, 1 + fake).mean()
    np.testing.assert_allclose(found["discriminator"], hinge, rtol=1e-5)
    np.testing.assert_allclose(found["adversarial"], -fake.mean(), rtol=1e-4, atol=1e-6)


@pytest.mark.backend
def test_the_adversarial_loss_alone_reaches_the_reconstruction(discriminator):
    def loss(name):
        return lambda x: discriminator.losses_of(images(4), x)[name]

    copies = images(4, seed=1)
    assert not gradient(loss("discriminator"), copies).any()
    found = gradient(loss("adversarial"), copies)
    assert np.abs(found).max() > 0
    expected = gradient(lambda x: -ops.mean(discriminator(x)), copies)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-8)


class Game(keras.Model):
    """The two losses with a reconstruction that is one trainable offset."""

    def __init__(self, discriminator, name):
        super().__init__()
        self.discriminator = discriminator
        self.kept = name
        self.offset = self.add_weight(name="offset", shape=(), initializer="zeros")

    def call(self, images):
        return self.discriminator.losses_of(images, images[::-1] + self.offset)

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        return y_pred[self.kept]


@pytest.mark.parametrize(
    ("name", "moves_discriminator"), [("discriminator", True), ("adversarial", False)]
)
def test_each_loss_moves_its_own_side(name, moves_discriminator):
    keras.utils.set_random_seed(0)
    layer = PatchDiscriminator(width=8)
    layer.build((None, 16, 16, 3))
    model = Game(layer, name)
    before = [array(weight) for weight in layer.trainable_variables]
    model.compile(keras.optimizers.SGD(0.1))
    model.fit(images(4), batch_size=4, verbose=0)
    moved = [
        np.abs(array(weight) - old).max() > 0
        for weight, old in zip(layer.trainable_variables, before, strict=True)
    ]
    assert np.mean(moved) > 0.8 if moves_discriminator else not any(moved)
    assert (array(model.offset) != 0) == (not moves_discriminator)


def test_round_trip_and_precision():
    layer = PatchDiscriminator(width=8, strides=3, dtype="mixed_bfloat16")
    twin = keras.saving.deserialize_keras_object(keras.saving.serialize_keras_object(layer))
    assert isinstance(twin, PatchDiscriminator) and twin.get_config() == layer.get_config()
    assert {part.compute_dtype for part in twin.stack} == {"bfloat16"}
    for copy in (layer, twin):
        copy.build((None, 16, 16, 3))
    twin.set_weights(layer.get_weights())
    logits = array(layer(images(2)))
    assert logits.shape == (2, 2, 2, 1) and logits.dtype == np.float32
    np.testing.assert_array_equal(logits, array(twin(images(2))))
    assert {weight.dtype for weight in layer.weights} == {"float32"}
