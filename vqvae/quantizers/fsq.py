"""Finite scalar quantization (FSQ): rounds each channel; there is no learned codebook."""

import math

import keras
import numpy as np
from keras import ops

from vqbeam.vqvae.quantizers.base import Quantized, Quantizer
from vqbeam.vqvae.quantizers.estimators import straight_through


@keras.saving.register_keras_serializable("vqbeam")
class FiniteScalarQuantizer(Quantizer):
    """Rounds each channel to a few values; all their combinations form an implicit codebook.

    From "Finite Scalar Quantization: VQ-VAE Made Simple", Mentzer et al. 2023
    (https://arxiv.org/abs/2309.15505), appendix A.1: a tanh bounds channel i to the range of L_i
    values around 0, then the channel is rounded with a straight-through gradient. The output is
    scaled to [−1, 1]. For L_i = 2, the channel is split at 0: with the paper's shift, training
    would start where the slope is 0.001.

    Args:
        levels_per_channel: Number of values per channel, each at least 2, such as (8, 8, 8) for
            K = 512.

    Raises:
        ValueError: `levels_per_channel` is empty or has a number below 2.
    """

    # Extends the range of the tanh, relatively, so that it reaches the outermost values, and at
    # most by so much that no value beyond them is rounded to.
    margin, largest_margin = 1e-3, 0.25

    def __init__(self, levels_per_channel, **kwargs):
        super().__init__(**kwargs)
        if not levels_per_channel or min(levels_per_channel) < 2:
            raise ValueError(f"levels_per_channel is {levels_per_channel}; each must be at least 2")
        self.levels_per_channel = tuple(levels_per_channel)
        self.dim = len(levels_per_channel)
        self.num_codes = math.prod(levels_per_channel)
        sizes = np.asarray(levels_per_channel, "int32")
        # An even number of values L means the values −L/2, ..., L/2 − 1.
        self._half = sizes // 2
        # Place value of each channel in a code; the first channel changes fastest.
        self._basis = np.cumprod([1, *sizes[:-1]], dtype="int32")

    def call(self, z, training=False):
        """Quantizes z [..., D]."""
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
        """Returns the float32 vectors [..., D] in [−1, 1] for codes [...] in [0, num_codes)."""
        digits = codes[..., None] // self._basis % np.asarray(self.levels_per_channel, "int32")
        return ops.cast(digits - self._half, "float32") / self._half.astype("float32")

    def _bounded(self, z):
        sizes = np.asarray(self.levels_per_channel, "float32")
        half_range = (sizes - 1) / 2
        reach = half_range + np.minimum(half_range * self.margin, self.largest_margin)
        offset = np.where(sizes % 2 == 0, 0.5, 0.0)
        # No shift for L = 2, whose boundary is 0: the shift would move it to where tanh is flat.
        shift = np.arctanh(np.where(sizes == 2, 0.0, offset) / reach).astype("float32")
        return ops.tanh(z + shift) * reach - offset.astype("float32")

    def _codes(self, rounded):
        digits = ops.cast(ops.round(rounded + self._half.astype("float32")), "int32")
        return ops.sum(digits * self._basis, axis=-1)

    def get_config(self):
        """Returns the constructor's arguments."""
        return {**super().get_config(), "levels_per_channel": self.levels_per_channel}
