"""The vector quantizer as a layer for any Keras model: tensor in, tensor out."""

import keras

from vqbeam.vqvae.quantizers import vector


@keras.saving.register_keras_serializable("vqbeam.layers")
class VectorQuantizer(vector.VectorQuantizer):
    """Replaces each vector of a tensor by the nearest one of a learned codebook.

    It works in any Keras model, on TensorFlow and JAX. The output has the input's shape and the
    gradient passes through, so the layers before it learn. The layer adds its own losses, so
    `model.fit` needs nothing else. Models with it are saved and loaded as any other.

    Args:
        num_codes: Number K of vectors in the codebook.
        code_dim: Length D of a vector, which must be the size of the input's last axis.
        **settings: What else `vqbeam.vqvae.quantizers.vector.VectorQuantizer` takes, such as
            `commitment=0.25`, `update="gradient"` for a codebook that the optimizer trains, and
            `restart_below=0.1`, which keeps all codes in use.

    Attributes:
        codebook: Keras variable, float32 [K, D]. After restarts with `update="gradient"`, and
            with `lookup="cosine"`, `vectors()` has what the codes stand for.

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
        """Returns the nearest codebook vectors, float32 [..., D], for z of [..., D]."""
        result = super().call(z, training=training)
        self.add_loss(sum(result.losses.values()))
        return result.quantized

    def compute_output_shape(self, input_shape):
        """Returns the input's shape."""
        return input_shape
