"""Finite scalar quantization: each number is rounded to one of a few; no codebook learns."""

import math

import keras
import numpy as np
from keras import ops

from vqbeam.vqvae.quantizers.base import Quantized, Quantizer
from vqbeam.vqvae.quantizers.estimators import straight_through


@keras.saving.register_keras_serializable("vqbeam")
class FiniteScalarQuantizer(Quantizer):
    """Rounds each of a few channels to a small number of values, of which the grid is the codebook.

    From "Finite Scalar Quantization: VQ-VAE Made Simple", Mentzer et al. 2023
    (https://arxiv.org/abs/2309.15505), appendix A.1: channel i is bounded by a tanh to L_i values
    around 0 and rounded, with the straight-through gradient of the rounding. The values are given
    to the decoder on [−1, 1]. Where L_i is 2, the sign of the channel is taken: the paper's shift
    would have it begin where the slope is a thousandth.

    Args:
        levels_per_channel: Values of each channel, each at least 2, such as (8, 8, 8) for K = 512.
    """

    # Keeps the outermost values in reach of the tanh.
    margin = 1e-3

    def __init__(self, levels_per_channel, **kwargs):
        super().__init__(**kwargs)
        if not levels_per_channel or min(levels_per_channel) < 2:
            raise ValueError(f"levels_per_channel is {levels_per_channel}; each must be at least 2")
        self.levels_per_channel = tuple(levels_per_channel)
        self.dim = len(levels_per_channel)
        self.num_codes = math.prod(levels_per_channel)
        sizes = np.asarray(levels_per_channel, "int32")
        # Where the number of values is even, they lie at −L/2, ..., L/2 − 1.
        self._half = sizes // 2
        # Place of each channel in the number of a code: the first changes fastest.
        self._basis = np.cumprod([1, *sizes[:-1]], dtype="int32")

    def call(self, z, training=False):
        """Quantizes z of [..., D]."""
        del training
        bounded = self._bounded(ops.cast(z, "float32"))
        rounded = ops.round(bounded)
        half = self._half.astype("float32")
        error = (bounded - rounded) / half
        return Quantized(
            straight_through(bounded, rounded) / half,
            self._codes(rounded),
            {},
            {"quantization_error": ops.stop_gradient(ops.mean(ops.square(error)))},
        )

    def decode_codes(self, codes):
        """Returns the grid points [..., D] float32 on [−1, 1] of codes [...] in [0, num_codes)."""
        digits = codes[..., None] // self._basis % np.asarray(self.levels_per_channel, "int32")
        return ops.cast(digits - self._half, "float32") / self._half.astype("float32")

    def _bounded(self, z):
        sizes = np.asarray(self.levels_per_channel, "float32")
        reach = (sizes - 1) * (1 + self.margin) / 2
        offset = np.where(sizes % 2 == 0, 0.5, 0.0)
        # Of two values 0 is the border: the shift would put it where the tanh is flat.
        shift = np.arctanh(np.where(sizes == 2, 0.0, offset) / reach).astype("float32")
        return ops.tanh(z + shift) * reach - offset.astype("float32")

    def _codes(self, rounded):
        digits = ops.cast(ops.round(rounded + self._half.astype("float32")), "int32")
        return ops.sum(digits * self._basis, axis=-1)

    def get_config(self):
        """Returns the constructor's arguments."""
        return {**super().get_config(), "levels_per_channel": self.levels_per_channel}
