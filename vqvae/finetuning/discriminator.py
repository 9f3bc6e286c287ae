"""A patch discriminator and its adversarial losses, for sharper reconstructions."""

import keras
from keras import layers, ops


@keras.saving.register_keras_serializable("vqbeam")
class PatchDiscriminator(layers.Layer):
    """A convolutional network that classifies image patches as original or reconstructed.

    From Isola et al. 2017 (https://arxiv.org/abs/1611.07004), section 3.2: strided convolutions,
    each output of which depends on one patch of the image. Group normalization replaces batch
    normalization, since originals and reconstructions are passed in separate batches.

    Args:
        width: Channels of the first convolution, doubled in each further strided convolution.
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
        """Creates the weights for images [B, H, W, C]."""
        shape = input_shape
        for layer in self.stack:
            layer.build(shape)
            shape = layer.compute_output_shape(shape)

    def call(self, images):
        """Returns float32 logits [B, h, w, 1], high for originals, for images [B, H, W, C]."""
        x = images
        for layer in self.stack:
            x = layer(x)
        return ops.cast(x, "float32")

    def losses_of(self, images, reconstruction):
        """Returns the scalar losses "discriminator" and "adversarial" of Lim and Ye 2017.

        These are the hinge loss, whose gradient reaches only the discriminator, and −D(x̂), whose
        gradient reaches only the reconstruction (https://arxiv.org/abs/1705.02894). They can
        therefore be summed and minimized by one optimizer.

        Args:
            images: [B, H, W, C].
            reconstruction: [B, H, W, C].
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
