"""The vector quantizer: nearest-neighbour lookup in a learned codebook."""

import keras
from keras import ops

from vqbeam.vqvae.fitting.devices import from_first_replica, sum_over_replicas
from vqbeam.vqvae.quantizers.base import Quantized, Quantizer, assign_where, entropy_loss
from vqbeam.vqvae.quantizers.estimators import ESTIMATORS
from vqbeam.vqvae.quantizers.nearest import initial_codebook, nearest_codes


@keras.saving.register_keras_serializable("vqbeam")
class VectorQuantizer(Quantizer):
    """Replaces each vector of a grid with the nearest one in a learned codebook.

    From "Neural Discrete Representation Learning", van den Oord et al. 2017
    (https://arxiv.org/abs/1711.00937), equations 1 to 3. For example, a grid z of shape
    [32, 8, 8, 64] is treated as 2,048 vectors of length 64. Each vector gets the index of its
    nearest codebook vector, so the codes have shape [32, 8, 8] and the quantized grid has shape
    [32, 8, 8, 64].

    The codebook is trained in one of two ways:

    - `update="gradient"`: the codebook is trainable, and the codebook loss ‖sg(z) − e‖² pulls it
      towards the encoder outputs.
    - `update="ema"`: the codebook follows exponential moving averages (appendix A.1). Each codebook
      vector is the ratio of the EMA of the sum of the vectors that chose it and the EMA of their
      count. Both start at zero, so their bias cancels (except for the smoothing: less than 1% for
      decay ≤ 0.999). Codes that no vector in the batch chose are unchanged.

    In both cases, rarely used codes are moved to vectors of the batch (Dhariwal et al. 2020,
    https://arxiv.org/abs/2005.00341).

    Args:
        num_codes: Codebook size K.
        code_dim: Length D of a vector; the size of the input's last axis.
        lookup: "l2" for the nearest vector by distance. "cosine" first normalizes z and the
            codebook to length 1 (Yu et al. 2021, https://arxiv.org/abs/2110.04627); the quantized
            vectors then also have length 1.
        update: "ema" or "gradient".
        decay: Decay of the moving averages, in [0, 1).
        restart_below: Codes with a usage below this fraction of the mean usage are restarted, in
            [0, 1); 0 disables restarts.
        estimator: Gradient estimator: "straight_through", "rotation" or "diveq".
        commitment: Weight β of ‖z − sg(e)‖².
        entropy: Weight of the entropy loss E[H(p)] − H(E[p]) in nats, where p are soft assignments.
            It favours confident assignments and uniform code usage. It needs the full N×K distance
            matrix in memory.
        balance: Strength of the usage penalty: `balance` · m · log(usage / mean usage) is added to
            the squared distance to each code, where m is a moving average of the squared distance
            to the chosen code; 0 disables it. It keeps all codes in use without an extra loss, as
            Wang et al. 2024 (https://arxiv.org/abs/2408.15664) do for experts. It is the opposite
            of entropy-constrained quantization (Chou et al. 1989,
            https://doi.org/10.1109/29.17498), which favours frequent codes.

    Attributes:
        codebook: float32 [K, D]; `vectors()` returns the vectors of the codes.
        usage: float32 [K]. Each training step sets usage ← 0.99 · usage + counts of the batch;
            evaluation does not change it.

    Raises:
        ValueError: `lookup`, `update` or `estimator` is none of the above.
    """

    # Avoids division by near-zero counts.
    epsilon = 1e-5
    usage_decay = 0.99
    # Lower limit of usage / mean usage in the usage penalty.
    smallest_share = 0.01

    def __init__(
        self,
        num_codes,
        code_dim,
        *,
        lookup="l2",
        update="ema",
        decay=0.99,
        restart_below=0.0,
        estimator="straight_through",
        commitment=0.25,
        entropy=0.0,
        balance=0.0,
        **kwargs,
    ):
        super().__init__(**kwargs)
        _check_choice("lookup", lookup, ("l2", "cosine"))
        _check_choice("update", update, ("ema", "gradient"))
        _check_choice("estimator", estimator, [name for name in ESTIMATORS if name != "none"])
        self.num_codes = num_codes
        self.dim = code_dim
        self.lookup = lookup
        self.update = update
        self.decay = decay
        self.restart_below = restart_below
        self.estimator = estimator
        self.commitment = commitment
        self.entropy = entropy
        self.balance = balance
        self.seed_generator = keras.random.SeedGenerator(0)

    @property
    def loss_names(self):
        """Names of the losses in use."""
        names = ("codebook",) if self.update == "gradient" else ()
        return (*names, "commitment", *(("entropy",) if self.entropy else ()))

    def build(self, input_shape):
        """Creates the codebook and the averages; the input's last axis must be `code_dim`."""
        super().build(input_shape)
        shape = (self.num_codes, self.dim)
        self._build_codebook(shape)
        self.usage = self._statistic("usage", shape[:1])
        if self.balance:
            self.mean_error = self._statistic("mean_error", ())
        if self.update == "ema":
            self.ema_counts = self._statistic("ema_counts", shape[:1])
            self.ema_sums = self._statistic("ema_sums", shape)
        elif self._has_moves:
            # On JAX, a training step cannot assign trainable variables, so restarts are stored as
            # offsets to the codebook.
            self.moves = self._statistic("moves", shape)

    def _build_codebook(self, shape):
        self.codebook = self.add_weight(
            name="codebook",
            shape=shape,
            initializer=keras.initializers.VarianceScaling(mode="fan_out", distribution="uniform"),
            trainable=self.update == "gradient",
        )

    def _statistic(self, name, shape):
        return self.add_weight(name=name, shape=shape, initializer="zeros", trainable=False)

    def call(self, z, training=False):
        """Quantizes z [..., D]; in training, statistics are updated after codes are assigned."""
        z = self._on_sphere(ops.cast(z, "float32"))
        codes = self._nearest(z)
        quantized = self.decode_codes(codes)
        result = Quantized(
            ESTIMATORS[self.estimator](z, quantized),
            codes,
            self._loss_terms(z, quantized),
            {"quantization_error": ops.stop_gradient(ops.mean(ops.square(z - quantized)))},
        )
        if training and self.trainable:
            self.update_statistics(z, codes)
        return result

    def encode(self, z):
        """Returns the int32 codes [...] nearest to the vectors of z [..., D]."""
        return self._nearest(self._on_sphere(ops.cast(z, "float32")))

    def decode_codes(self, codes):
        """Returns the float32 codebook vectors [..., D] for codes [...] in [0, num_codes)."""
        vectors = ops.take(self.codebook, codes, axis=0)
        if self._has_moves:
            vectors = vectors + ops.take(self.moves, codes, axis=0)
        return self._on_sphere(vectors)

    def vectors(self):
        """Returns the vectors of all codes, float32 [K, D]."""
        vectors = ops.convert_to_tensor(self.codebook)
        return self._on_sphere(vectors + self.moves if self._has_moves else vectors)

    @property
    def _has_moves(self):
        return self.update == "gradient" and self.restart_below > 0

    def _on_sphere(self, vectors):
        if self.lookup == "l2":
            return vectors
        # Not ops.normalize, whose gradient on JAX is NaN for a zero vector.
        squares = ops.sum(ops.square(vectors), axis=-1, keepdims=True)
        return vectors * ops.rsqrt(ops.maximum(squares, 1e-12))

    def _nearest(self, z):
        codes = nearest_codes(self.as_vectors(z), self.vectors(), self._penalties())
        return ops.reshape(codes, ops.shape(z)[:-1])

    def _penalties(self):
        """Returns the usage penalties added to the squared distances, [K], or None."""
        if not self.balance:
            return None
        share = self.usage / ops.maximum(ops.mean(self.usage), self.epsilon)
        return self.balance * self.mean_error * ops.log(ops.maximum(share, self.smallest_share))

    def _loss_terms(self, z, quantized):
        losses = {}
        if self.update == "gradient":
            losses["codebook"] = ops.mean(ops.square(ops.stop_gradient(z) - quantized))
        error = ops.mean(ops.square(z - ops.stop_gradient(quantized)))
        losses["commitment"] = self.commitment * error
        if self.entropy:
            vectors, chosen = self.as_vectors(z), self.as_vectors(quantized)
            losses["entropy"] = self.entropy * entropy_loss(vectors, chosen, self.vectors())
        return losses

    def update_statistics(self, z, codes):
        """Updates codebook and usage from vectors z [..., D] and their codes [...]."""
        vectors = ops.stop_gradient(self.as_vectors(z))
        codes = ops.reshape(codes, (-1,))
        if self.balance:
            self._track_error(vectors, codes)
        counts = ops.segment_sum(
            ops.ones_like(codes, dtype="float32"), codes, num_segments=self.num_codes
        )
        if self.update == "ema":
            sums = ops.segment_sum(vectors, codes, num_segments=self.num_codes)
            counts, sums = sum_over_replicas(counts, sums)
            self._move_codebook(counts, sums)
        else:
            (counts,) = sum_over_replicas(counts)
        self.usage.assign(self.usage_decay * self.usage + counts)
        if self.restart_below > 0:
            self._restart_codes(vectors)

    def _track_error(self, vectors, codes):
        errors = ops.sum(ops.square(vectors - ops.stop_gradient(self.decode_codes(codes))), axis=1)
        total, count = sum_over_replicas(ops.sum(errors), ops.sum(ops.ones_like(errors)))
        error = total / ops.maximum(count, 1.0)
        self.mean_error.assign(self.usage_decay * (self.mean_error - error) + error)

    def _move_codebook(self, counts, sums):
        ema_counts = self.decay * self.ema_counts + (1.0 - self.decay) * counts
        ema_sums = self.decay * self.ema_sums + (1.0 - self.decay) * sums
        total = ops.sum(ema_counts)
        smoothed = (ema_counts + self.epsilon) / (total + self.num_codes * self.epsilon) * total
        chosen = counts[:, None] > 0
        # Unused codes are left unchanged: both averages of their ratio decay to zero.
        moved = ema_sums / ops.where(chosen, smoothed[:, None], 1.0)
        assign_where(self.codebook, chosen, moved)
        self.ema_counts.assign(ema_counts)
        self.ema_sums.assign(ema_sums)

    def _restart_codes(self, vectors):
        """Moves rarely used codes to vectors of the batch and resets their averages and usage."""
        mean_usage = ops.mean(self.usage)
        neglected = self.usage < self.restart_below * mean_usage
        rows = neglected[:, None]
        drawn = from_first_replica(self._draw(vectors))
        assign_where(self.usage, neglected, mean_usage)
        if self.update == "gradient":
            assign_where(self.moves, rows, drawn - ops.stop_gradient(self.codebook))
        else:
            assign_where(self.codebook, rows, drawn)
            mean_count = ops.mean(self.ema_counts)
            assign_where(self.ema_sums, rows, drawn * mean_count)
            assign_where(self.ema_counts, neglected, mean_count)

    def _draw(self, vectors):
        size = ops.shape(vectors)[0]
        draws = keras.random.uniform((self.num_codes,), seed=self.seed_generator)
        places = ops.minimum(ops.cast(draws * ops.cast(size, "float32"), "int32"), size - 1)
        return ops.take(vectors, places, axis=0)

    def initialize(self, vectors, method, seed):
        """Initializes the codebook from encoder outputs; see `Quantizer.initialize`."""
        if method == "random":
            return
        vectors = self._on_sphere(ops.cast(vectors, "float32"))
        codebook, counts = initial_codebook(vectors, self.num_codes, method, seed)
        self.codebook.assign(codebook)
        self.usage.assign(counts)
        if self.update == "ema":
            self.ema_counts.assign(ops.copy(counts))  # JAX donates the buffers of variables
            self.ema_sums.assign(codebook * counts[:, None])

    def get_config(self):
        """Returns the constructor's arguments."""
        return {
            **super().get_config(),
            "num_codes": self.num_codes,
            "code_dim": self.dim,
            "lookup": self.lookup,
            "update": self.update,
            "decay": self.decay,
            "restart_below": self.restart_below,
            "estimator": self.estimator,
            "commitment": self.commitment,
            "entropy": self.entropy,
            "balance": self.balance,
        }


def _check_choice(name, value, choices):
    if value not in choices:
        raise ValueError(f"{name} is {value!r}; choose one of {', '.join(map(repr, choices))}")
