"""Residual quantization: several codes per vector, each of which refines the previous ones."""

import keras
from keras import ops

from vqbeam.vqvae.quantizers.base import Quantized, Quantizer
from vqbeam.vqvae.quantizers.estimators import ESTIMATORS
from vqbeam.vqvae.quantizers.vector import VectorQuantizer


@keras.saving.register_keras_serializable("vqbeam")
class ResidualQuantizer(Quantizer):
    """Replaces each vector with a sum of vectors, one from each of several codebooks.

    From "Autoregressive Image Generation using Residual Quantization", Lee et al. 2022
    (https://arxiv.org/abs/2203.01941), equations 2 to 4: each level quantizes the residual of the
    previous levels, and the commitment losses, summed over the levels, pull z towards every
    partial sum. Each level has its own codebook, as in SoundStream
    (https://arxiv.org/abs/2107.03312).

    Args:
        levels: Number of codebooks.
        num_codes: Size K of each codebook.
        code_dim: Length D of a vector; the size of the input's last axis.
        **settings: Other arguments of `VectorQuantizer`, the same for all levels.

    Raises:
        ValueError: `lookup` is "cosine".
    """

    def __init__(self, levels, num_codes, code_dim, **settings):
        own = {key: settings.pop(key) for key in ("name", "trainable") if key in settings}
        settings.pop("dtype", None)
        super().__init__(**own)
        if settings.get("lookup", "l2") != "l2":
            raise ValueError("lookup is 'cosine', but the residuals' lengths matter; use 'l2'")
        self.levels = levels
        self.num_codes = num_codes
        self.dim = code_dim
        self.settings = settings
        self.quantizers = [VectorQuantizer(num_codes, code_dim, **settings) for _ in range(levels)]
        self.loss_names = self.quantizers[0].loss_names

    def build(self, input_shape):
        """Creates the codebooks; the input's last axis must be `code_dim`."""
        super().build(input_shape)
        for quantizer in self.quantizers:
            quantizer.build(input_shape)

    def call(self, z, training=False):
        """Quantizes z [..., D]; in training, statistics are updated after all levels."""
        z = ops.cast(z, "float32")
        residual, inputs, results = z, [], []
        for quantizer in self.quantizers:
            inputs.append(residual)
            results.append(quantizer(residual, training=False))
            chosen = quantizer.decode_codes(results[-1].codes)
            residual = residual - ops.stop_gradient(chosen)
        # At the end, so that all residuals come from the old codebooks.
        if training and self.trainable:
            for quantizer, left, result in zip(self.quantizers, inputs, results, strict=True):
                quantizer.update_statistics(left, result.codes)
        codes = ops.stack([result.codes for result in results], axis=-1)
        return Quantized(
            ESTIMATORS[self.quantizers[0].estimator](z, z - ops.stop_gradient(residual)),
            codes,
            {name: sum(result.losses[name] for result in results) for name in self.loss_names},
            results[-1].statistics,
        )

    def decode_codes(self, codes):
        """Returns the float32 sums [..., D] of the codebook vectors for codes [..., levels]."""
        levels = ops.unstack(codes, self.levels, axis=-1)
        return sum(q.decode_codes(code) for q, code in zip(self.quantizers, levels, strict=True))

    def initialize(self, vectors, method, seed):
        """Initializes each codebook from the residuals of the previous levels."""
        for level, quantizer in enumerate(self.quantizers):
            quantizer.initialize(vectors, method, seed + level)
            vectors = vectors - quantizer.decode_codes(quantizer.encode(vectors))

    def get_config(self):
        """Returns the constructor's arguments."""
        return {
            **super().get_config(),
            "levels": self.levels,
            "num_codes": self.num_codes,
            "code_dim": self.dim,
            **self.settings,
        }
