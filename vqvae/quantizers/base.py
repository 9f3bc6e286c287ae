"""What every quantizer has in common: its result, its interface, and its place in training."""

from typing import Any, NamedTuple

import keras
from keras import ops

from vqbeam.vqvae.fitting.devices import mean_over_replicas


class Quantized(NamedTuple):
    """What a quantizer makes of its input `z`.

    Attributes:
        quantized: [..., D] float32. Its value is that of the chosen vectors; its gradient goes to
            `z`, as the quantizer's estimator lets it.
        codes: [...] int32 in [0, num_codes), with a last axis of `levels` where there are several.
        losses: Scalars by name, each already times its weight: `codebook`, which moves the
            codebook alone; `commitment` and others, which move the encoder.
        statistics: Scalars by name that are worth a look and have no gradient:
            `quantization_error`, ‖z − e‖² as a mean over all elements.
    """

    quantized: Any
    codes: Any
    losses: dict[str, Any]
    statistics: dict[str, Any]


class Quantizer(keras.layers.Layer):
    """The interface of all quantizers.

    Quantizers compute in float32 whatever the dtype of the input: bfloat16 has too few digits to
    tell near codes apart.

    Attributes:
        dim: Channels D of the input and of the quantized vectors.
        num_codes: Number of codes K of one level.
        levels: Codes that stand for one vector.
        loss_names: The keys of `Quantized.losses`.
    """

    dim: int
    num_codes: int
    levels: int = 1
    loss_names: tuple[str, ...] = ()

    def __init__(self, **kwargs):
        super().__init__(**{**kwargs, "dtype": "float32"})

    def build(self, input_shape):
        """Checks the input's channels; families with weights create them."""
        if input_shape[-1] != self.dim:
            raise ValueError(
                f"the quantizer takes {self.dim} channels, its input has {input_shape[-1]}; "
                "make them equal"
            )

    def call(self, z, training=False) -> Quantized:
        """Quantizes z [..., D]; in training the statistics move, after the assignment."""
        raise NotImplementedError

    def encode(self, z):
        """Returns the codes [...] (with `levels`, [..., levels]) of z [..., D]; no gradient."""
        return self(z).codes

    def decode_codes(self, codes):
        """Returns the vectors [..., D] float32 that the codes stand for."""
        raise NotImplementedError

    def initialize(self, vectors, method: str, seed: int) -> None:
        """Places the codebook among encoder outputs before the first step, where there is one.

        Args:
            vectors: float32 [N, D].
            method: "random" leaves the codebook as it is; "data" takes vectors; "kmeans" their
                cluster centres.
            seed: Of the random choices.
        """

    def as_vectors(self, z):
        """Returns z [..., D] as float32 [N, D]."""
        return ops.reshape(ops.cast(z, "float32"), (-1, self.dim))


def assign_where(variable, condition, values) -> None:
    """Sets a variable to `values` where the condition holds."""
    variable.assign(ops.where(condition, values, ops.convert_to_tensor(variable)))


_SMALL = 1e-5


def entropy_loss(vectors, chosen, codebook):
    """Returns E[H(p)] − H(E[p]) in nats, where p is the soft assignment of a vector.

    As in section 3.1 of Yu et al. 2023 (https://arxiv.org/abs/2310.05737), with p the softmax of
    −‖z − e‖² in units of the mean squared distance to the code chosen, so that it is the same at
    any scale of z. The gradient reaches the vectors alone.

    Args:
        vectors: float32 [N, D].
        chosen: float32 [N, D], the code vector of each.
        codebook: float32 [K, D].
    """
    codebook = ops.stop_gradient(codebook)
    error = ops.mean(ops.sum(ops.square(ops.stop_gradient(vectors - chosen)), axis=1))
    unit = ops.maximum(mean_over_replicas(error), _SMALL)
    distances = (
        ops.sum(ops.square(vectors), axis=1, keepdims=True)
        - 2.0 * ops.matmul(vectors, ops.transpose(codebook))
        + ops.sum(ops.square(codebook), axis=1)
    )
    log_p = ops.log_softmax(-distances / unit, axis=1)
    p = ops.exp(log_p)
    mean_p = mean_over_replicas(ops.mean(p, axis=0))
    of_each = -ops.mean(ops.sum(p * log_p, axis=1))
    of_mean = -ops.sum(mean_p * ops.log(ops.maximum(mean_p, 1e-20)))
    return of_each - of_mean
