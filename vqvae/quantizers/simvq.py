"""SimVQ: a codebook that is a learned linear map of fixed random vectors."""

import keras
from keras import ops

from vqbeam.vqvae.fitting.devices import full_precision
from vqbeam.vqvae.quantizers.vector import VectorQuantizer


# Saved models refer to the class by its name in earlier versions.
@keras.saving.register_keras_serializable("vqbeam", name="LinearVectorQuantizer")
class SimVQ(VectorQuantizer):
    """A vector quantizer whose codebook is a fixed random matrix times a learned one.

    From "Addressing Representation Collapse in Vector Quantized Models with One Linear Layer", Zhu
    et al. 2024 (https://arxiv.org/abs/2411.02038), section 4: the codebook vectors are C·W, where
    C [K, D] is random and fixed, and W [D, D] is trained by the codebook loss. The gradient for
    any code moves all codes, which prevents dead codes.

    Args:
        num_codes: Codebook size K.
        code_dim: Length D of a vector; the size of the input's last axis.
        lookup: "l2" or "cosine"; see `VectorQuantizer`, also for the other arguments.
        estimator: "straight_through", "rotation" or "diveq".
        commitment: Weight β of the commitment loss.
        entropy: Weight of the entropy loss.
    """

    def __init__(
        self,
        num_codes,
        code_dim,
        *,
        lookup="l2",
        estimator="straight_through",
        commitment=0.25,
        entropy=0.0,
        **kwargs,
    ):
        super().__init__(
            num_codes,
            code_dim,
            lookup=lookup,
            update="gradient",
            estimator=estimator,
            commitment=commitment,
            entropy=entropy,
            **kwargs,
        )

    def _build_codebook(self, shape):
        self.codebook = self.add_weight(
            name="codebook", shape=shape, initializer="random_normal", trainable=False
        )
        self.projection = self.add_weight(
            name="projection", shape=(self.dim, self.dim), initializer="identity"
        )

    def decode_codes(self, codes):
        """Returns the float32 codebook vectors [..., D] for codes [...] in [0, num_codes)."""
        fixed = ops.take(self.codebook, codes, axis=0)
        return self._on_sphere(self._mapped(fixed))

    def vectors(self):
        """Returns the vectors of all codes, float32 [K, D]."""
        return self._on_sphere(self._mapped(self.codebook))

    def _mapped(self, vectors):
        with full_precision():
            return ops.matmul(vectors, self.projection)

    def initialize(self, vectors, method, seed):
        """Scales the codebook to the RMS of encoder outputs, for both "data" and "kmeans"."""
        del seed
        if method != "random":
            sizes = [ops.sqrt(ops.mean(ops.square(x))) for x in (vectors, self.codebook)]
            self.projection.assign(ops.eye(self.dim) * (sizes[0] / sizes[1]))

    def get_config(self):
        """Returns the constructor's arguments."""
        fixed = ("update", "decay", "restart_below", "balance")
        return {k: v for k, v in super().get_config().items() if k not in fixed}
