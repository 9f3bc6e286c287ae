"""Lookup-free quantization: the code is the signs of the channels, read as a binary number."""

import keras
import numpy as np
from keras import ops

from vqbeam.vqvae.fitting.devices import mean_over_replicas
from vqbeam.vqvae.quantizers.base import Quantized, Quantizer
from vqbeam.vqvae.quantizers.estimators import straight_through


@keras.saving.register_keras_serializable("vqbeam")
class LookupFreeQuantizer(Quantizer):
    """Replaces each channel by its sign.

    From "Language Model Beats Diffusion: Tokenizer is Key to Visual Generation", Yu et al. 2023
    (https://arxiv.org/abs/2310.05737), section 3.1 and equation 5: the K = 2^D codes are the
    corners of a cube, so nothing is looked up, and an entropy loss keeps all of them in use:
    E[H(p)] − H(E[p]) over soft assignments p, in which the channels are independent given z.

    The second entropy would take N×K numbers. The channels are taken in groups of at most
    `group` for it, and the groups as independent, as in section 3.2 of Zhao et al. 2024
    (https://arxiv.org/abs/2406.07548); for K up to 2^`group` it is exact.

    Args:
        num_bits: Channels D; K = 2^D.
        commitment: The weight β of ‖z − sg(e)‖².
        entropy: Weight of the entropy loss, which is in nats per code.
    """

    group = 9
    # p(bit = 1) = σ(4 z), the softmax over the distances −(z ∓ 1)² to both values.
    sharpness = 4.0

    def __init__(self, num_bits, commitment=0.25, entropy=0.1, **kwargs):
        super().__init__(**kwargs)
        if not 1 <= num_bits <= 30:
            raise ValueError(f"num_bits is {num_bits}; codes have from 1 to 30 bits")
        self.dim = num_bits
        self.num_codes = 2**num_bits
        self.commitment = commitment
        self.entropy = entropy
        self.loss_names = ("commitment", *(("entropy",) if entropy else ()))
        self._powers = 2 ** np.arange(num_bits, dtype="int32")

    def call(self, z, training=False):
        """Quantizes z of [..., D]."""
        del training
        z = ops.cast(z, "float32")
        signs = ops.where(ops.stop_gradient(z) > 0, 1.0, -1.0)
        error = ops.mean(ops.square(z - signs))
        losses = {"commitment": self.commitment * error}
        if self.entropy:
            losses["entropy"] = self.entropy * self._entropy_loss(self.as_vectors(z))
        return Quantized(
            straight_through(z, signs),
            self.encode(z),
            losses,
            {"quantization_error": ops.stop_gradient(error)},
        )

    def encode(self, z):
        """Returns the codes [...] int32 of z [..., D]; no gradient."""
        bits = ops.cast(ops.stop_gradient(z) > 0, "int32")
        return ops.sum(bits * self._powers, axis=-1)

    def decode_codes(self, codes):
        """Returns the corners [..., D] float32 of codes [...] in [0, num_codes)."""
        bits = codes[..., None] // self._powers % 2
        return ops.cast(2 * bits - 1, "float32")

    def _entropy_loss(self, z):
        logits = self.sharpness * z
        log_one, log_zero = ops.log_sigmoid(logits), ops.log_sigmoid(-logits)
        of_bits = -(ops.exp(log_one) * log_one + ops.exp(log_zero) * log_zero)
        of_each = ops.mean(ops.sum(of_bits, axis=1))
        of_mean = 0.0
        for first in range(0, self.dim, self.group):
            of_mean += self._group_entropy(ops.sigmoid(logits[:, first : first + self.group]))
        return of_each - of_mean

    def _group_entropy(self, ones):
        """Returns the entropy of the mean distribution over the codes of a group of bits."""
        p = ops.ones_like(ones[:, :1])
        for bit in range(ones.shape[1]):
            one = ones[:, bit : bit + 1]
            p = ops.concatenate([p * (1.0 - one), p * one], axis=1)
        mean_p = mean_over_replicas(ops.mean(p, axis=0))
        return -ops.sum(mean_p * ops.log(ops.maximum(mean_p, 1e-20)))

    def get_config(self):
        """Returns the constructor's arguments."""
        return {
            **super().get_config(),
            "num_bits": self.dim,
            "commitment": self.commitment,
            "entropy": self.entropy,
        }
