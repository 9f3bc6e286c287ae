"""A model with large gradients, and checks of gradients; for TensorFlow."""

import keras
import numpy as np
import tensorflow as tf

from vqbeam.vqvae.model import VQVAE
from vqbeam.vqvae.quantizers.vector import VectorQuantizer

K, D, BETA, VARIANCE = 7, 3, 0.4, 0.3
SHAPE = (8, 8, 1)


def build(update="gradient", quantizer=None, **changes):
    """A model whose codes are spread among its latents; `changes` go to `VQVAE`."""
    keras.utils.set_random_seed(0)
    model = VQVAE(
        image_shape=SHAPE,
        quantizer=quantizer or VectorQuantizer(K, D, update=update, commitment=BETA),
        downsampling=4,
        width=8,
        residual_layers=1,
        residual_width=4,
        data_variance=VARIANCE,
        **changes,
    )
    # Larger weights, for gradients well above the rounding of finite differences; and codes among
    # the latents, so that several are chosen.
    for kernel in model.encoder.trainable_variables + model.decoder.trainable_variables:
        kernel.assign(kernel * 2)
    if quantizer is None:
        z = model.encoder(IMAGES).numpy().reshape(-1, D)
        model.quantizer.codebook.assign(z[:: len(z) // K][:K] + 0.01)
    return model


IMAGES = np.random.default_rng(0).uniform(-1, 1, (5, *SHAPE)).astype("float32")


def values(variables):
    return [variable.value for variable in variables]


def encoder_weights(model):
    return values(model.encoder.trainable_variables)


def decoder_weights(model):
    return values(model.decoder.trainable_variables)


def reconstruction_loss(images, reconstruction):
    return tf.reduce_mean(tf.square(images - reconstruction))


def whole_loss(model, training=True):
    return model.compute_loss(x=IMAGES, y_pred=model(IMAGES, training=training))


def some_reach(gradients):
    """Whether every variable receives a gradient, and most gradients are not zero."""
    if any(gradient is None for gradient in gradients):
        return False
    nonzero = [np.abs(tf.convert_to_tensor(gradient)).max() > 0 for gradient in gradients]
    return np.mean(nonzero) > 0.7


def none_reach(gradients):
    assert len(gradients) > 0, "there is nothing to reach"
    return all(gradient is None for gradient in gradients)


def check_by_differences(variables, gradients, loss, step=3e-3):
    """Compares gradients with central differences of `loss()`, in a random direction each."""
    numbers = np.random.default_rng(1)
    checked = 0
    for variable, gradient in zip(variables, gradients, strict=True):
        gradient = tf.convert_to_tensor(gradient).numpy()
        direction = np.sign(gradient) + numbers.normal(size=gradient.shape) * 0.1
        direction = (direction / np.linalg.norm(direction)).astype("float32")
        start = variable.numpy()
        variable.assign(start + step * direction)
        above = float(loss())
        variable.assign(start - step * direction)
        below = float(loss())
        variable.assign(start)
        slope = np.sum(np.float64(gradient) * direction)
        np.testing.assert_allclose((above - below) / (2 * step), slope, rtol=0.03, atol=1e-4)
        checked += abs(slope) > 2e-3
    assert checked > len(variables) / 2  # most are not lost in the tolerance
