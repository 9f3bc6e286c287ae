"""Encoder and decoder with normalized residual blocks at every resolution, as in VQGAN."""

import functools
import math

import keras
from keras import layers


@keras.saving.register_keras_serializable("vqbeam")
class NormalizedBlock(layers.Layer):
    """A residual block, x + conv3×3(silu(norm(conv3×3(silu(norm(x)))))), with group normalization.

    From Esser et al. 2021 (https://arxiv.org/abs/2012.09841), table 7. If the number of channels
    changes, x passes through a 1×1 convolution.

    Args:
        width: Channels of the output.
        groups: Groups of the normalization; divides the channels of input and output.
    """

    def __init__(self, width, groups, **kwargs):
        super().__init__(**kwargs)
        self.width = width
        self.groups = groups
        dtype = self.dtype_policy
        self.norms = [_normalization(groups, dtype) for _ in range(2)]
        self.convs = [layers.Conv2D(width, 3, padding="same", dtype=dtype) for _ in range(2)]
        self.shortcut = layers.Conv2D(width, 1, dtype=dtype)

    def build(self, input_shape):
        """Builds the normalizations and convolutions."""
        shape = input_shape
        for norm, conv in zip(self.norms, self.convs, strict=True):
            norm.build(shape)
            conv.build(shape)
            shape = (*input_shape[:-1], self.width)
        if input_shape[-1] != self.width:
            self.shortcut.build(input_shape)

    def call(self, x):
        """Returns a tensor [B, H, W, width] for x [B, H, W, C]."""
        h = x
        for norm, conv in zip(self.norms, self.convs, strict=True):
            h = conv(keras.ops.silu(norm(h)))
        return h + (self.shortcut(x) if self.shortcut.built else x)

    def get_config(self):
        """Returns the constructor's arguments."""
        return {**super().get_config(), "width": self.width, "groups": self.groups}


def build_encoder(
    image_shape, *, latent_channels, downsampling, width, residual_layers, dtype
) -> keras.Model:
    """Returns the encoder, from images [B, H, W, C] to [B, H/f, W/f, latent_channels].

    The layers are those of VQGAN without attention, which Weber et al. 2024 also leave out
    (https://arxiv.org/abs/2409.16211, section 3).

    Args:
        image_shape: (H, W, C); H and W are multiples of `downsampling`.
        latent_channels: Channels of the output.
        downsampling: The factor f, a power of two, with one strided convolution per factor of 2.
        width: Channels at the full resolution; doubled at each lower one, up to 4 times as many.
        residual_layers: Number of residual blocks at each resolution; the decoder has one more.
        dtype: Keras dtype policy of all layers.
    """
    conv, block = _parts(width, dtype)
    *upper, lowest = _channels(width, downsampling)
    images = keras.Input(image_shape)
    x = conv(width, 3)(images)
    for channels in upper:
        for _ in range(residual_layers):
            x = block(channels)(x)
        x = conv(channels, 3, strides=2)(x)
    for _ in range(residual_layers + 2):
        x = block(lowest)(x)
    x = _activated(x, width, dtype)
    return keras.Model(images, conv(latent_channels, 3)(x), name="encoder")


def build_decoder(
    image_shape, *, latent_channels, downsampling, width, residual_layers, dtype
) -> keras.Model:
    """Returns the decoder, from [B, H/f, W/f, latent_channels] to float32 images [B, H, W, C].

    It mirrors `build_encoder` and takes the same arguments. The resolution is doubled by repeating
    pixels before a convolution, since strided transposed convolutions leave checkerboard artifacts.
    """
    height, image_width, colors = image_shape
    conv, block = _parts(width, dtype)
    lowest, *upper = reversed(_channels(width, downsampling))
    latents = keras.Input((height // downsampling, image_width // downsampling, latent_channels))
    x = conv(lowest, 3)(latents)
    for _ in range(residual_layers + 3):
        x = block(lowest)(x)
    for channels in upper:
        x = layers.UpSampling2D(2, dtype=dtype)(x)
        x = conv(x.shape[-1], 3)(x)
        for _ in range(residual_layers + 1):
            x = block(channels)(x)
    x = conv(colors, 3)(_activated(x, width, dtype))
    images = layers.Activation("linear", dtype="float32")(x)
    return keras.Model(latents, images, name="decoder")


def _channels(width, downsampling):
    """Returns the channels at each resolution, from the full one to the lowest."""
    return [width * min(2**level, 4) for level in range(downsampling.bit_length())]


def _parts(width, dtype):
    conv = functools.partial(layers.Conv2D, padding="same", dtype=dtype)
    return conv, functools.partial(NormalizedBlock, groups=_groups(width), dtype=dtype)


def _groups(width):
    """Returns the largest power of two up to 32 that divides the channels of every layer."""
    return math.gcd(width, 32)


def _normalization(groups, dtype):
    return layers.GroupNormalization(groups, epsilon=1e-6, dtype=dtype)


def _activated(x, width, dtype):
    return layers.Activation("silu", dtype=dtype)(_normalization(_groups(width), dtype)(x))
