"""What every quantizer has in common: its result, its interface, and its place in training."""

from typing import Any, NamedTuple

import keras
from keras import ops


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
