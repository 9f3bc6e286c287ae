"""The residual quantizer: several codes for one vector, each refining those before it."""

import keras
from keras import ops

from vqbeam.vqvae.quantizers.base import Quantized, Quantizer
from vqbeam.vqvae.quantizers.estimators import ESTIMATORS
from vqbeam.vqvae.quantizers.vector import VectorQuantizer


@keras.saving.register_keras_serializable("vqbeam")
class ResidualQuantizer(Quantizer):
    """Replaces a vector by the sum of one vector from each of several codebooks.

    From "Autoregressive Image Generation using Residual Quantization", Lee et al. 2022
    (https://arxiv.org/abs/2203.01941), equations 2 to 4: each level quantizes what the levels
    before it have left, so that the commitment losses, summed over the levels, draw z to every
    partial sum. Each level has a codebook of its own, as in SoundStream
    (https://arxiv.org/abs/2107.03312).

    Args:
        levels: Number of codebooks.
        num_codes: Size K of each codebook.
        code_dim: Length D of a vector; the last axis of the input.
        **settings: What else `VectorQuantizer` takes, for each level.
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
        """Creates the codebooks; the last axis must be `code_dim`."""
        super().build(input_shape)
        for quantizer in self.quantizers:
            quantizer.build(input_shape)

    def call(self, z, training=False):
        """Quantizes z of [..., D]; in training the statistics move, after the assignment."""
        z = ops.cast(z, "float32")
        residual, inputs, results = z, [], []
        for quantizer in self.quantizers:
            inputs.append(residual)
            results.append(quantizer(residual, training=False))
            chosen = quantizer.decode_codes(results[-1].codes)
            residual = residual - ops.stop_gradient(chosen)
        if training:  # after all levels have chosen: what one leaves is by the old codebook
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
        """Returns the sums [..., D] float32 of the vectors of codes [..., levels]."""
        levels = ops.unstack(codes, self.levels, axis=-1)
        return sum(q.decode_codes(code) for q, code in zip(self.quantizers, levels, strict=True))

    def initialize(self, vectors, method, seed):
        """Places each codebook among what the levels before it leave; see `Quantizer`."""
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
