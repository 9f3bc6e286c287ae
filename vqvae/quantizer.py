"""The vector quantizer: nearest codebook vector, straight-through gradient, moving averages."""

from typing import Any, NamedTuple

import keras
from keras import ops


class Quantized(NamedTuple):
    """What a quantizer makes of its input `z`.

    Attributes:
        quantized: [B, H, W, D] in the dtype of the quantizer. Its value is that of the chosen
            codebook vectors, its gradient goes to `z` unchanged.
        codes: [B, H, W] int32, in [0, num_codes).
        codebook_loss: Scalar, ‖sg(z) − e‖² as a mean over all elements; zero where moving
            averages move the codebook.
        commitment_loss: Scalar, ‖z − sg(e)‖² as a mean over all elements, not yet times β.
    """

    quantized: Any
    codes: Any
    codebook_loss: Any
    commitment_loss: Any


def squared_distances(vectors, codebook):
    """Returns ‖z‖² − 2 z·e + ‖e‖² of each of [N, D] vectors to each of [K, D] codes, [N, K]."""
    return (
        ops.sum(ops.square(vectors), axis=1, keepdims=True)
        - 2.0 * ops.matmul(vectors, ops.transpose(codebook))
        + ops.sum(ops.square(codebook), axis=1)
    )


def straight_through(z, quantized):
    """Returns `quantized` in value, with the gradient of the identity on `z`.

    The estimator of Bengio et al. 2013 (https://arxiv.org/abs/1308.3432), as used in section 3.2
    of van den Oord et al. 2017: z + sg(e − z).
    """
    return z + ops.stop_gradient(quantized - z)


@keras.saving.register_keras_serializable("vqbeam")
class VectorQuantizer(keras.layers.Layer):
    """Replaces each vector of a grid by the nearest one of a learned codebook.

    From "Neural Discrete Representation Learning", van den Oord et al. 2017
    (https://arxiv.org/abs/1711.00937), equations 1 to 3. A grid z of [32, 8, 8, 64] is taken as
    2,048 vectors of 64 numbers; each gets the index of its nearest codebook vector, so that the
    codes are [32, 8, 8] and the quantized grid is again [32, 8, 8, 64].

    The codebook moves in one of two ways, never both:

    - `update="gradient"`: it is trainable, and the codebook loss draws it to the encoder.
    - `update="ema"`: appendix A.1. Per code, moving averages of how many vectors chose it and of
      their sum; the code becomes the ratio. Both start at zero, so the factor by which a moving
      average is biased cancels, and a code that no vector of the batch chose stays where it is.

    In the second way, codes that hardly any vector chooses are moved onto vectors of the batch
    (Dhariwal et al. 2020, https://arxiv.org/abs/2005.00341). At the first step that
    is most of them, so that the codebook begins among the data.

    Distances, averages and losses are computed in float32 whatever the dtype of the input:
    bfloat16 has too few digits to tell near codes apart.

    Args:
        num_codes: Codebook size K.
        code_dim: Length D of a vector; the last axis of the input.
        update: "ema" or "gradient".
        decay: Decay of the moving averages, in [0, 1).
        restart_below: A code is moved when its usage is below this share of the mean usage, in
            [0, 1); 0 for never. Has no effect on a codebook that learns by gradient.

    Attributes:
        codebook: [K, D] float32.
        usage: [K] float32. At each training step usage ← 0.99 · usage + counts of the batch;
            unchanged in evaluation.
    """

    # Keeps a code that was chosen by next to nothing from dividing by next to nothing.
    epsilon = 1e-5
    usage_decay = 0.99

    def __init__(self, num_codes, code_dim, update="ema", decay=0.99, restart_below=0.0, **kwargs):
        super().__init__(**{**kwargs, "dtype": "float32"})
        if update not in ("ema", "gradient"):
            raise ValueError(f"update is {update!r}; choose 'ema' or 'gradient'")
        self.num_codes = num_codes
        self.code_dim = code_dim
        self.update = update
        self.decay = decay
        self.restart_below = restart_below
        self.seed_generator = keras.random.SeedGenerator(0)

    def build(self, input_shape):
        """Creates the codebook and the averages; the last axis must be `code_dim`."""
        if input_shape[-1] != self.code_dim:
            raise ValueError(
                f"the quantizer's code_dim is {self.code_dim}, its input has {input_shape[-1]} "
                "channels; make them equal"
            )
        shape = (self.num_codes, self.code_dim)
        self.codebook = self.add_weight(
            name="codebook",
            shape=shape,
            initializer=keras.initializers.VarianceScaling(mode="fan_out", distribution="uniform"),
            trainable=self.update == "gradient",
        )
        self.usage = self._statistic("usage", shape[:1])
        if self.update == "ema":
            self.ema_counts = self._statistic("ema_counts", shape[:1])
            self.ema_sums = self._statistic("ema_sums", shape)

    def _statistic(self, name, shape):
        return self.add_weight(name=name, shape=shape, initializer="zeros", trainable=False)

    def call(self, z, training=False):
        """Quantizes z of [B, H, W, D]; in training the statistics move, after the assignment."""
        codes = self.nearest(z)
        quantized = self.lookup(codes)
        codebook_loss = ops.mean(ops.square(ops.stop_gradient(z) - quantized))
        commitment_loss = ops.mean(ops.square(z - ops.stop_gradient(quantized)))
        if self.update == "ema":
            codebook_loss = ops.zeros_like(codebook_loss)
        if training:
            self._update_statistics(z, codes)
        return Quantized(straight_through(z, quantized), codes, codebook_loss, commitment_loss)

    def nearest(self, z):
        """Returns the codes [...] int32 nearest to the vectors of z [..., D]; no gradient."""
        vectors = ops.reshape(ops.cast(ops.stop_gradient(z), "float32"), (-1, self.code_dim))
        distances = squared_distances(vectors, ops.stop_gradient(self.codebook))
        codes = ops.cast(ops.argmin(distances, axis=1), "int32")
        return ops.reshape(codes, ops.shape(z)[:-1])

    def lookup(self, codes):
        """Returns the codebook vectors [..., D] float32 of codes [...] in [0, num_codes)."""
        return ops.take(self.codebook, codes, axis=0)

    def _update_statistics(self, z, codes):
        vectors = ops.reshape(ops.stop_gradient(z), (-1, self.code_dim))
        codes = ops.reshape(codes, (-1,))
        counts = ops.segment_sum(
            ops.ones_like(codes, dtype="float32"), codes, num_segments=self.num_codes
        )
        self.usage.assign(self.usage_decay * self.usage + counts)
        if self.update == "ema":
            sums = ops.segment_sum(vectors, codes, num_segments=self.num_codes)
            self._move_codebook(counts, sums)
            if self.restart_below > 0:
                self._restart_codes(vectors)

    def _move_codebook(self, counts, sums):
        ema_counts = self.decay * self.ema_counts + (1.0 - self.decay) * counts
        ema_sums = self.decay * self.ema_sums + (1.0 - self.decay) * sums
        total = ops.sum(ema_counts)
        smoothed = (ema_counts + self.epsilon) / (total + self.num_codes * self.epsilon) * total
        chosen = counts[:, None] > 0
        # Codes that no vector chose have a ratio of two fading numbers: they keep their place.
        moved = ema_sums / ops.where(chosen, smoothed[:, None], 1.0)
        _assign_where(self.codebook, chosen, moved)
        self.ema_counts.assign(ema_counts)
        self.ema_sums.assign(ema_sums)

    def _restart_codes(self, vectors):
        """Moves neglected codes onto vectors of the batch: place, averages and usage together."""
        mean_usage, mean_count = ops.mean(self.usage), ops.mean(self.ema_counts)
        neglected = self.usage < self.restart_below * mean_usage
        size = ops.shape(vectors)[0]
        draws = keras.random.uniform((self.num_codes,), seed=self.seed_generator)
        places = ops.minimum(ops.cast(draws * ops.cast(size, "float32"), "int32"), size - 1)
        drawn = ops.take(vectors, places, axis=0)
        rows = neglected[:, None]
        _assign_where(self.codebook, rows, drawn)
        _assign_where(self.ema_sums, rows, drawn * mean_count)
        _assign_where(self.ema_counts, neglected, mean_count)
        _assign_where(self.usage, neglected, mean_usage)

    def get_config(self):
        """Returns the constructor's arguments."""
        return {
            **super().get_config(),
            "num_codes": self.num_codes,
            "code_dim": self.code_dim,
            "update": self.update,
            "decay": self.decay,
            "restart_below": self.restart_below,
        }


def _assign_where(variable, condition, values):
    variable.assign(ops.where(condition, values, ops.convert_to_tensor(variable)))
