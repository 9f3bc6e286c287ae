"""The vector quantizer as a layer for any Keras model."""

import keras

from vqbeam.vqvae.quantizers import vector


@keras.saving.register_keras_serializable("vqbeam.layers")
class VectorQuantizer(vector.VectorQuantizer):
    """A layer that replaces each vector with the nearest one in a learned codebook.

    It works in any Keras model, on TensorFlow and JAX. The output has the shape of the input, and
    gradients pass through to the preceding layers. The layer adds its own losses, so `model.fit`
    needs no changes. Models with this layer are saved and loaded like any other.

    Args:
        num_codes: Codebook size K.
        code_dim: Length D of a vector, equal to the size of the input's last axis.
        **settings: Other arguments of `vqbeam.vqvae.quantizers.vector.VectorQuantizer`, such as
            `commitment=0.25`, `update="gradient"` to train the codebook with the optimizer, and
            `restart_below=0.1` to keep all codes in use.

    Attributes:
        codebook: Keras variable, float32 [K, D]. With `update="gradient"` and restarts, or with
            `lookup="cosine"`, use `vectors()` for the vectors of the codes.

    Raises:
        ValueError: A setting is out of range, or the input's last axis is not `code_dim`.

    Example:
        >>> images = keras.Input((28, 28, 1))
        >>> z = keras.layers.Conv2D(16, 4, strides=4)(images)
        >>> z = vqbeam.VectorQuantizer(num_codes=256, code_dim=16)(z)
        >>> outputs = keras.layers.Conv2DTranspose(1, 4, strides=4)(z)
        >>> model = keras.Model(images, outputs)
    """

    def call(self, z, training=False):
        """Returns the nearest codebook vectors, float32 [..., D], for z [..., D]."""
        result = super().call(z, training=training)
        self.add_loss(sum(result.losses.values()))
        return result.quantized

    def compute_output_shape(self, input_shape):
        """Returns the input's shape."""
        return input_shape
