"""A patch discriminator: an adversarial loss, for sharper pictures."""

import keras
from keras import layers, ops


@keras.saving.register_keras_serializable("vqbeam")
class PatchDiscriminator(layers.Layer):
    """Tells images from reconstructions, patch by patch.

    The network is that of Isola et al. 2017 (https://arxiv.org/abs/1611.07004), section 3.2:
    strided convolutions whose every output sees a patch of the image. Group normalisation takes
    the place of batch normalisation, since originals and reconstructions come in batches of their
    own.

    Args:
        width: Channels of the first convolution; each further one has twice as many.
        strides: Number of strided convolutions.
    """

    def __init__(self, width=32, strides=2, **kwargs):
        super().__init__(**kwargs)
        self.width = width
        self.strides = strides
        conv = {"kernel_size": 4, "padding": "same", "dtype": self.dtype_policy}
        self.stack = []
        for i in range(strides):
            self.stack.append(layers.Conv2D(width * 2**i, strides=2, **conv))
            if i:
                self.stack.append(layers.GroupNormalization(8, dtype=self.dtype_policy))
            self.stack.append(layers.LeakyReLU(0.2, dtype=self.dtype_policy))
        self.stack.append(layers.Conv2D(1, **conv))

    def build(self, input_shape):
        """Creates the weights, for images [B, H, W, C]."""
        shape = input_shape
        for layer in self.stack:
            layer.build(shape)
            shape = layer.compute_output_shape(shape)

    def call(self, images):
        """Returns logits [B, h, w, 1] float32, high for originals; images [B, H, W, C]."""
        x = images
        for layer in self.stack:
            x = layer(x)
        return ops.cast(x, "float32")

    def losses_of(self, images, reconstruction):
        """Returns the two losses of the game as scalars.

        They are those of Lim and Ye 2017 (https://arxiv.org/abs/1705.02894): the hinge loss, whose
        gradient reaches the discriminator alone, and −D(x̂), whose gradient reaches the
        reconstruction alone. Both can so be part of one sum under one optimizer.
        """
        hinge = ops.mean(ops.relu(1.0 - self(images))) + ops.mean(
            ops.relu(1.0 + self(ops.stop_gradient(reconstruction)))
        )
        frozen = [ops.stop_gradient(variable) for variable in self.trainable_variables]
        logits, _ = self.stateless_call(frozen, self.non_trainable_variables, reconstruction)
        return {"discriminator": hinge, "adversarial": -ops.mean(logits)}

    def get_config(self):
        """Returns the constructor's arguments."""
        return {**super().get_config(), "width": self.width, "strides": self.strides}
