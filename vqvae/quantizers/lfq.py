"""Lookup-free quantization (LFQ): a code is the binary number given by the channels' signs."""

import keras
import numpy as np
from keras import ops

from vqbeam.vqvae.fitting.devices import mean_over_replicas
from vqbeam.vqvae.quantizers.base import Quantized, Quantizer
from vqbeam.vqvae.quantizers.estimators import straight_through


@keras.saving.register_keras_serializable("vqbeam")
class LookupFreeQuantizer(Quantizer):
    """Replaces each channel with its sign.

    From "Language Model Beats Diffusion: Tokenizer is Key to Visual Generation", Yu et al. 2023
    (https://arxiv.org/abs/2310.05737), section 3.1 and equation 5. The K = 2^D codes are the
    corners of a cube, so no codebook lookup is needed. An entropy loss keeps all codes in use:
    E[H(p)] − H(E[p]) over soft assignments p, in which the channels are independent given z.

    Computing H(E[p]) exactly would take N×K numbers. Instead, the channels are split into groups
    of at most `group`, which are treated as independent, as in section 3.2 of Zhao et al. 2024
    (https://arxiv.org/abs/2406.07548). The result is exact for K up to 2^`group`.

    Args:
        num_bits: Channels D, from 1 to 30; K = 2^D.
        commitment: Weight β of ‖z − sg(e)‖².
        entropy: Weight of the entropy loss, which is in nats per code.

    Raises:
        ValueError: `num_bits` is out of range.
    """

    group = 9
    # p(bit = 1) = σ(4 z): the softmax over −(z ∓ 1)², the negative distances to both values.
    sharpness = 4.0

    def __init__(self, num_bits, commitment=0.25, entropy=0.1, **kwargs):
        super().__init__(**kwargs)
        if not 1 <= num_bits <= 30:
            raise ValueError(f"num_bits is {num_bits}; it must be from 1 to 30")
        self.dim = num_bits
        self.num_codes = 2**num_bits
        self.commitment = commitment
        self.entropy = entropy
        self.loss_names = ("commitment", *(("entropy",) if entropy else ()))
        self._powers = 2 ** np.arange(num_bits, dtype="int32")

    def call(self, z, training=False):
        """Quantizes z [..., D]."""
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
        """Returns the int32 codes [...] of z [..., D]."""
        bits = ops.cast(ops.stop_gradient(z) > 0, "int32")
        return ops.sum(bits * self._powers, axis=-1)

    def decode_codes(self, codes):
        """Returns the float32 vectors [..., D] of ±1 for codes [...] in [0, num_codes)."""
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
        """Returns H(E[p]) for a group of bits, given their probabilities of 1, [N, bits]."""
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
