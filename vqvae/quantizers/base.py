"""The interface and result type shared by all quantizers, and the entropy loss."""

from typing import Any, NamedTuple

import keras
from keras import ops

from vqbeam.vqvae.fitting.devices import full_precision, mean_over_replicas


class Quantized(NamedTuple):
    """The output of a quantizer for an input `z`.

    Attributes:
        quantized: [..., D] float32. The chosen vectors in the forward pass; in the backward pass,
            the gradient goes to `z` through the quantizer's estimator.
        codes: [...] int32 in [0, num_codes), with a last axis of size `levels` if that is above 1.
        losses: Weighted scalar losses by name: `codebook`, which trains only the codebook, and
            `commitment` and others, which train the encoder.
        statistics: Scalar metrics by name, without gradient: `quantization_error`, the mean of
            (z − e)² over all elements, with z as it is compared with the codes.
    """

    quantized: Any
    codes: Any
    losses: dict[str, Any]
    statistics: dict[str, Any]


class Quantizer(keras.layers.Layer):
    """The base class of all quantizers.

    Quantizers compute in float32 for any input dtype, since bfloat16 is not precise enough to
    separate nearby codes.

    Attributes:
        dim: Channels D of the input and of the quantized vectors.
        num_codes: Number of codes K per level.
        levels: Number of codes per vector.
        loss_names: The keys of `Quantized.losses`.
    """

    dim: int
    num_codes: int
    levels: int = 1
    loss_names: tuple[str, ...] = ()

    def __init__(self, **kwargs):
        super().__init__(**{**kwargs, "dtype": "float32"})

    def build(self, input_shape):
        """Checks that the input has `dim` channels; subclasses with weights create them here."""
        if input_shape[-1] != self.dim:
            raise ValueError(
                f"the quantizer takes {self.dim} channels, its input has {input_shape[-1]}; "
                "make them equal"
            )

    def call(self, z, training=False) -> Quantized:
        """Quantizes z [..., D]; in training, statistics are updated after codes are assigned."""
        raise NotImplementedError

    def encode(self, z):
        """Returns the int32 codes [...], or [..., levels], of z [..., D]."""
        return self(z).codes

    def decode_codes(self, codes):
        """Returns the float32 vectors [..., D] for codes [...] or [..., levels]."""
        raise NotImplementedError

    def initialize(self, vectors, method: str, seed: int) -> None:
        """Initializes the codebook, if any, from encoder outputs before the first step.

        Args:
            vectors: Encoder outputs, float32 [N, D].
            method: "random" keeps the codebook unchanged, "data" samples from the vectors, and
                "kmeans" uses their cluster centres.
            seed: Random seed.
        """

    def as_vectors(self, z):
        """Returns z [..., D] reshaped to float32 [N, D]."""
        return ops.reshape(ops.cast(z, "float32"), (-1, self.dim))


def assign_where(variable, condition, values) -> None:
    """Assigns `values` to the elements of a variable where `condition` is true."""
    variable.assign(ops.where(condition, values, ops.convert_to_tensor(variable)))


_SMALL = 1e-5


def entropy_loss(vectors, chosen, codebook):
    """Returns E[H(p)] − H(E[p]) in nats, where p is the soft code assignment of a vector.

    See Yu et al. 2023 (https://arxiv.org/abs/2310.05737), section 3.1. Here, p is the softmax of
    −‖z − e‖² divided by the mean squared distance to the chosen code, which makes the loss
    independent of the scale of z. Only the vectors receive a gradient.

    Args:
        vectors: float32 [N, D].
        chosen: float32 [N, D], the codebook vector chosen for each.
        codebook: float32 [K, D].
    """
    codebook = ops.stop_gradient(codebook)
    error = ops.mean(ops.sum(ops.square(ops.stop_gradient(vectors - chosen)), axis=1))
    unit = ops.maximum(mean_over_replicas(error), _SMALL)
    with full_precision():
        products = ops.matmul(vectors, ops.transpose(codebook))
    distances = (
        ops.sum(ops.square(vectors), axis=1, keepdims=True)
        - 2.0 * products
        + ops.sum(ops.square(codebook), axis=1)
    )
    log_p = ops.log_softmax(-distances / unit, axis=1)
    p = ops.exp(log_p)
    mean_p = mean_over_replicas(ops.mean(p, axis=0))
    of_each = -ops.mean(ops.sum(p * log_p, axis=1))
    of_mean = -ops.sum(mean_p * ops.log(ops.maximum(mean_p, 1e-20)))
    return of_each - of_mean
