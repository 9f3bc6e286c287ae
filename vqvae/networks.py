"""Encoder and decoder networks: strided convolutions and a stack of residual blocks."""

import functools

import keras
from keras import layers


@keras.saving.register_keras_serializable("vqbeam")
class ResidualBlock(layers.Layer):
    """A residual block, x + conv1×1(relu(conv3×3(relu(x)))).

    From van den Oord et al. 2017 (https://arxiv.org/abs/1711.00937), section 4.1.

    Args:
        width: Channels of input and output.
        hidden: Channels between the two convolutions.
    """

    def __init__(self, width, hidden, **kwargs):
        super().__init__(**kwargs)
        self.width = width
        self.hidden = hidden
        dtype = self.dtype_policy
        self.conv_in = layers.Conv2D(hidden, 3, padding="same", use_bias=False, dtype=dtype)
        self.conv_out = layers.Conv2D(width, 1, use_bias=False, dtype=dtype)

    def build(self, input_shape):
        """Builds both convolutions."""
        self.conv_in.build(input_shape)
        self.conv_out.build((*input_shape[:-1], self.hidden))

    def call(self, x):
        """Returns a tensor of the shape of x, [B, H, W, width]."""
        h = self.conv_in(keras.ops.relu(x))
        return x + self.conv_out(keras.ops.relu(h))

    def get_config(self):
        """Returns the constructor's arguments."""
        return {**super().get_config(), "width": self.width, "hidden": self.hidden}


def build_encoder(
    image_shape, *, latent_channels, downsampling, width, residual_layers, residual_width, dtype
) -> keras.Model:
    """Returns the encoder, from images [B, H, W, C] to [B, H/f, W/f, latent_channels].

    Args:
        image_shape: (H, W, C); H and W are multiples of `downsampling`.
        latent_channels: Channels of the output.
        downsampling: The factor f, a power of two, with one strided convolution per factor of 2.
        width: Channels of the residual stack; all but the last strided convolution have half.
        residual_layers: Number of residual blocks.
        residual_width: Channels inside a residual block.
        dtype: Keras dtype policy of all layers.
    """
    images = keras.Input(image_shape)
    conv = functools.partial(layers.Conv2D, padding="same", dtype=dtype)
    x = images
    doublings = downsampling.bit_length() - 1
    for i in range(doublings):
        channels = width if i == doublings - 1 else width // 2
        x = conv(channels, 4, strides=2, activation="relu")(x)
    x = conv(width, 3)(x)
    x = _residual_stack(x, width, residual_layers, residual_width, dtype)
    return keras.Model(images, conv(latent_channels, 1)(x), name="encoder")


def build_decoder(
    image_shape, *, latent_channels, downsampling, width, residual_layers, residual_width, dtype
) -> keras.Model:
    """Returns the decoder, from [B, H/f, W/f, latent_channels] to float32 images [B, H, W, C].

    It mirrors `build_encoder` and takes the same arguments.
    """
    height, image_width, channels = image_shape
    latents = keras.Input((height // downsampling, image_width // downsampling, latent_channels))
    upsample = functools.partial(
        layers.Conv2DTranspose, kernel_size=4, strides=2, padding="same", dtype=dtype
    )
    x = layers.Conv2D(width, 3, padding="same", dtype=dtype)(latents)
    x = _residual_stack(x, width, residual_layers, residual_width, dtype)
    for _ in range(downsampling.bit_length() - 2):
        x = upsample(width // 2, activation="relu")(x)
    images = layers.Activation("linear", dtype="float32")(upsample(channels)(x))
    return keras.Model(latents, images, name="decoder")


def build_coarser(
    shape, latent_channels, width, *, residual_layers, residual_width, dtype
) -> keras.Model:
    """Returns the top encoder, from [B, h, w, c] to [B, h/2, w/2, latent_channels]."""
    features = keras.Input(shape)
    conv = functools.partial(layers.Conv2D, padding="same", dtype=dtype)
    x = conv(width, 4, strides=2, activation="relu")(features)
    x = conv(width, 3)(x)
    x = _residual_stack(x, width, residual_layers, residual_width, dtype)
    return keras.Model(features, conv(latent_channels, 1)(x), name="top_encoder")


def build_finer(
    shape, latent_channels, width, *, residual_layers, residual_width, dtype
) -> keras.Model:
    """Returns the top decoder, from [B, h, w, c] to [B, 2h, 2w, latent_channels]."""
    quantized = keras.Input(shape)
    x = layers.Conv2D(width, 3, padding="same", dtype=dtype)(quantized)
    x = _residual_stack(x, width, residual_layers, residual_width, dtype)
    x = layers.Conv2DTranspose(latent_channels, 4, strides=2, padding="same", dtype=dtype)(x)
    return keras.Model(quantized, x, name="top_decoder")


def build_projection(shape, channels, *, dtype) -> keras.Model:
    """Returns a 1×1 convolution from [B, h, w, c] to [B, h, w, channels]."""
    x = keras.Input(shape)
    return keras.Model(x, layers.Conv2D(channels, 1, dtype=dtype)(x), name="bottom_projection")


def _residual_stack(x, width, residual_layers, residual_width, dtype):
    for _ in range(residual_layers):
        x = ResidualBlock(width, residual_width, dtype=dtype)(x)
    return layers.ReLU(dtype=dtype)(x)
