"""The prior of stage 2: a causal transformer over grids of codes.

A grid of codes [h, w] is read in raster order as T = h·w tokens. The transformer's inputs are
`[class, code 0, ..., code T-2]` and it predicts `code 0, ..., code T-1`: input position p predicts
the code at raster position p.
"""

import math
from typing import Any

import keras
import keras_nlp
import numpy as np
from keras import ops

from prior.rotary import rotary_tables, rotate


@keras.saving.register_keras_serializable("vqbeam")
class Block(keras.layers.Layer):
    """A pre-norm transformer block with rotary positions and a SwiGLU.

    Computes `x + attention(norm(x))`, then `x + mlp(norm(x))`, with root-mean-square norms
    (Zhang and Sennrich, https://arxiv.org/abs/1910.07467, eq. 4) and the feed-forward
    `(silu(x W) * x V) W2` (Shazeer, https://arxiv.org/abs/2002.05202, eq. 6), which is 8/3 as wide
    as the block so that its three matrices hold as many weights as the usual two.

    Args:
        grid: Rows and columns of a code grid; T = rows · columns.
        width: Width of the residual stream.
        heads: Attention heads; `width / heads` is a multiple of 4.
        dropout: Dropout rate on what each branch adds.
    """

    def __init__(
        self, grid: tuple[int, int], width: int, heads: int, dropout: float = 0.0, **kwargs: Any
    ):
        super().__init__(**kwargs)
        self.grid, self.width, self.heads = tuple(grid), width, heads
        self.head_dim = width // heads
        self.hidden = math.ceil(8 * width / 3 / 32) * 32
        self.cos, self.sin = rotary_tables(self.grid, self.head_dim)
        policy = self.dtype_policy
        self.attention_norm = keras.layers.RMSNormalization(dtype=policy)
        self.qkv = keras.layers.Dense(3 * width, use_bias=False, dtype=policy)
        self.attention_output = keras.layers.Dense(width, use_bias=False, dtype=policy)
        self.mlp_norm = keras.layers.RMSNormalization(dtype=policy)
        self.gate_and_up = keras.layers.Dense(2 * self.hidden, use_bias=False, dtype=policy)
        self.down = keras.layers.Dense(width, use_bias=False, dtype=policy)
        self.dropout = keras.layers.Dropout(dropout, dtype=policy)

    def build(self, input_shape: tuple[int | None, ...]):
        """Creates the weights, for inputs [B, N, width]."""
        self.attention_norm.build(input_shape)
        self.qkv.build(input_shape)
        self.attention_output.build(input_shape)
        self.mlp_norm.build(input_shape)
        self.gate_and_up.build(input_shape)
        self.down.build((*input_shape[:-1], self.hidden))

    def call(self, x, training=False):
        """Applies the block to whole sequences.

        Args:
            x: Tensor [B, T, width].
            training: Whether dropout is on.

        Returns:
            A tensor [B, T, width].
        """
        query, key, value = self._query_key_value(x, self.cos, self.sin)
        attended = self._attend(query, key, value, np.tri(len(self.cos), dtype=bool))
        x = x + self.dropout(attended, training=training)
        return x + self.dropout(self._mlp(x), training=training)

    def step(self, x, key_cache, value_cache, position):
        """Applies the block to one position, given the keys and values of those before.

        Args:
            x: Tensor [B, 1, width], the input at `position`.
            key_cache: Rotated keys [B, heads, C, width / heads]; those from `position` on are
                not read.
            value_cache: Values, of the same shape.
            position: int32 scalar below C.

        Returns:
            The output [B, 1, width], and both caches with `position` filled in.
        """
        cos, sin = (
            ops.slice(table, (position, 0), (1, self.head_dim // 2))
            for table in (self.cos, self.sin)
        )
        query, key, value = self._query_key_value(x, cos, sin)
        key_cache = ops.slice_update(key_cache, (0, 0, position, 0), key)
        value_cache = ops.slice_update(value_cache, (0, 0, position, 0), value)
        past = ops.arange(key_cache.shape[2]) <= position
        x = x + self._attend(query, key_cache, value_cache, past)
        return x + self._mlp(x), key_cache, value_cache

    def empty_caches(self, batch_size: int, length: int) -> tuple:
        """Returns zeros for `step` to fill: keys and values [B, heads, length, width / heads]."""
        shape = (batch_size, self.heads, length, self.head_dim)
        return ops.zeros(shape, self.compute_dtype), ops.zeros(shape, self.compute_dtype)

    def _query_key_value(self, x, cos, sin):
        qkv = self.qkv(self.attention_norm(x))
        qkv = ops.reshape(qkv, (-1, x.shape[1], 3, self.heads, self.head_dim))
        query, key, value = ops.unstack(ops.transpose(qkv, (2, 0, 3, 1, 4)))  # [B, H, N, D] each
        return rotate(query, cos, sin), rotate(key, cos, sin), value

    def _attend(self, query, key, value, mask):
        # Trained on a CPU in float32, this takes two thirds of the time of
        # `ops.dot_product_attention` (benchmarks/choices.py).
        query = query * self.head_dim**-0.5
        scores = ops.matmul(query, ops.swapaxes(key, -1, -2))  # [B, H, N, C]
        scores = ops.where(mask, ops.cast(scores, "float32"), -1e9)
        weights = ops.cast(ops.softmax(scores), value.dtype)
        attended = ops.transpose(ops.matmul(weights, value), (0, 2, 1, 3))  # [B, N, H, D]
        return self.attention_output(ops.reshape(attended, (-1, query.shape[2], self.width)))

    def _mlp(self, x):
        gate, up = ops.split(self.gate_and_up(self.mlp_norm(x)), 2, axis=-1)
        return self.down(ops.silu(gate) * up)

    def get_config(self) -> dict[str, Any]:
        """Returns the constructor's arguments."""
        own = {
            "grid": self.grid,
            "width": self.width,
            "heads": self.heads,
            "dropout": self.dropout.rate,
        }
        return super().get_config() | own


@keras.saving.register_keras_serializable("vqbeam")
class CodePrior(keras.Model):
    """The distribution of a code grid given its class, one code at a time.

    Compile it with an optimizer alone: the loss is its own, the mean cross-entropy in nats per
    code. The head starts at zero, so that an untrained model has a loss of exactly log K.

    Example:
        >>> prior = CodePrior(512, grid=(8, 8), num_labels=10, layers=6, width=256, heads=8)
        >>> prior.compile(keras.optimizers.AdamW(1e-3))
        >>> prior.fit(dataset)  # of {"codes": [B, 8, 8], "labels": [B]}

    Args:
        num_codes: Codebook size K.
        grid: Rows and columns (h, w) of a code grid.
        num_labels: Classes; 0 for an unconditional model.
        layers: Transformer blocks.
        width: Width of the residual stream.
        heads: Attention heads; `width / heads` is a multiple of 4.
        dropout: Dropout rate in the blocks.

    Attributes:
        null_label: The label that stands for "no class": `num_labels`.
    """

    def __init__(
        self,
        num_codes: int,
        grid: tuple[int, int],
        num_labels: int,
        layers: int,
        width: int,
        heads: int,
        dropout: float = 0.0,
        **kwargs: Any,
    ):
        super().__init__(**kwargs)
        self.num_codes, self.grid, self.num_labels = num_codes, tuple(grid), num_labels
        self.width, self.heads, self.dropout = width, heads, dropout
        self.num_tokens = math.prod(self.grid)
        policy = self.dtype_policy
        self.label_embedding = keras.layers.Embedding(num_labels + 1, width, dtype=policy)
        self.code_embedding = keras.layers.Embedding(num_codes, width, dtype=policy)
        # Rotary positions are relative, but what belongs in a corner does not move about: each
        # input also learns its place. It predicts the next place on the grid, so one table says
        # both where the input is and where its prediction goes.
        self.position_embedding = keras_nlp.layers.PositionEmbedding(
            self.num_tokens, initializer="uniform", dtype=policy
        )
        self.blocks = [Block(self.grid, width, heads, dropout, dtype=policy) for _ in range(layers)]
        self.output_norm = keras.layers.RMSNormalization(dtype=policy)
        self.head = keras.layers.Dense(
            num_codes, use_bias=False, kernel_initializer="zeros", dtype=policy
        )
        self.cross_entropy = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        self._build_layers()

    def _build_layers(self):
        # Here rather than at the first call: a model that has just been loaded has its weights.
        sequence = (None, self.num_tokens, self.width)
        self.label_embedding.build((None,))
        self.code_embedding.build((None, None))
        for layer in (self.position_embedding, *self.blocks, self.output_norm, self.head):
            layer.build(sequence)
        self.built = True

    @property
    def null_label(self) -> int:
        """The label that stands for no class in particular, one past the last class."""
        return self.num_labels

    def call(self, inputs: dict[str, Any], training: bool = False):
        """Returns the logits of every code given its class and the codes before it.

        Args:
            inputs: `codes`, integers [B, h, w] in [0, K), and `labels`, integers [B] from 0 up to
                `null_label`; -1, the label of a dataset without classes, means `null_label` too.
            training: Whether dropout is on.

        Returns:
            A float32 tensor [B, T, K].
        """
        codes = ops.reshape(inputs["codes"], (-1, self.num_tokens))
        x = ops.concatenate(
            [self.embed_labels(inputs["labels"]), self.embed_codes(codes[:, :-1])], axis=1
        )
        x = x + self.position_embedding(x)
        for block in self.blocks:
            x = block(x, training=training)
        return self._logits(x)

    def step(self, x, caches: list, position):
        """Returns the logits at one position, given the keys and values of those before.

        Args:
            x: Tensor [B, 1, width]: `embed_labels` at position 0, later on `embed_codes` of the
                code before.
            caches: From `empty_caches`, or from the step before.
            position: int32 scalar, which position of the grid is predicted.

        Returns:
            Logits, a float32 tensor [B, K], and the new caches.
        """
        x = x + self.position_embedding(x, start_index=position)
        updated = []
        for block, (keys, values) in zip(self.blocks, caches, strict=True):
            x, keys, values = block.step(x, keys, values, position)
            updated.append((keys, values))
        return self._logits(x)[:, 0], updated

    def empty_caches(self, batch_size: int, length: int) -> list:
        """Returns one pair of caches [B, heads, length, width / heads] for each block."""
        return [block.empty_caches(batch_size, length) for block in self.blocks]

    def embed_labels(self, labels):
        """Returns the class tokens [B, 1, width] of integer labels [B]."""
        labels = ops.where(labels < 0, self.null_label, labels)
        return self.label_embedding(labels[:, None])

    def embed_codes(self, codes):
        """Returns the embeddings [B, N, width] of integer codes [B, N]."""
        return self.code_embedding(codes)

    def _logits(self, x):
        return ops.cast(self.head(self.output_norm(x)), "float32")

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        """Returns the mean cross-entropy in nats per code, which Keras reports as `loss`."""
        return self.cross_entropy(ops.reshape(x["codes"], (-1, self.num_tokens)), y_pred)

    def get_config(self) -> dict[str, Any]:
        """Returns the constructor's arguments."""
        own = {
            "num_codes": self.num_codes,
            "grid": self.grid,
            "num_labels": self.num_labels,
            "layers": len(self.blocks),
            "width": self.width,
            "heads": self.heads,
            "dropout": self.dropout,
        }
        return super().get_config() | own
