"""The transformer block of the prior, with 2-D rotary position embeddings."""

import dataclasses
import math
from typing import Any

import keras
import numpy as np
from keras import ops

from vqbeam.vqvae.fitting.devices import on_cpu
from vqbeam.vqvae.layout import CodeLayout


@keras.saving.register_keras_serializable("vqbeam")
class Block(keras.layers.Layer):
    """A pre-norm transformer block with causal attention, rotary positions and SwiGLU.

    Computes `x + attention(norm(x))`, then `x + mlp(norm(x))`, with RMS norms (Zhang and Sennrich,
    https://arxiv.org/abs/1910.07467, eq. 4) and the feed-forward network `(silu(x W) * x V) W2`
    (Shazeer, https://arxiv.org/abs/2002.05202, eq. 6). Its hidden width is 8/3 of the block's
    width, so its three matrices have as many weights as the usual two.

    Args:
        layout: The `CodeLayout` of an image's T codes.
        width: Width of the residual stream.
        heads: Number of attention heads; `width / heads` must be a multiple of 4.
        kv_heads: Number of key/value heads for grouped-query attention (Ainslie et al., "GQA",
            https://arxiv.org/abs/2305.13245), each shared by `heads / kv_heads` query heads, for
            smaller caches; 0 for the same number as `heads`.
        dropout: Dropout rate on the output of each branch.
        qk_norm: Whether to apply an RMS norm to the queries and keys of each head before they are
            rotated (Henry et al., https://arxiv.org/abs/2010.04245), which bounds their products.
        zero_init: Whether the last matrix of each branch starts at zero, so that an untrained block
            returns its input (Goyal et al., https://arxiv.org/abs/1706.02677, section 5.1).

    Attributes:
        remat: Whether the backward pass recomputes both branches instead of storing their
            activations, which takes more time but a fraction of the memory (Chen et al.,
            https://arxiv.org/abs/1604.06174).
    """

    remat = False

    def __init__(
        self,
        layout: CodeLayout,
        width: int,
        heads: int,
        kv_heads: int = 0,
        dropout: float = 0.0,
        qk_norm: bool = False,
        zero_init: bool = False,
        **kwargs: Any,
    ):
        super().__init__(**kwargs)
        self.layout, self.width, self.heads = CodeLayout.of(layout), width, heads
        self.kv_heads = kv_heads or heads
        self.head_dim = width // heads
        self.hidden = math.ceil(8 * width / 3 / 32) * 32
        self.cos, self.sin = rotary_tables(self.layout.rows, self.layout.columns, self.head_dim)
        self.zero_init = zero_init
        policy, last = self.dtype_policy, "zeros" if zero_init else "glorot_uniform"
        self.attention_norm = keras.layers.RMSNormalization(dtype=policy)
        self.qkv = keras.layers.Dense(
            width + 2 * self.kv_heads * self.head_dim, use_bias=False, dtype=policy
        )
        self.qk_norms = [keras.layers.RMSNormalization(dtype=policy) for _ in "qk" if qk_norm]
        self.attention_output = keras.layers.Dense(
            width, use_bias=False, kernel_initializer=last, dtype=policy
        )
        self.mlp_norm = keras.layers.RMSNormalization(dtype=policy)
        self.gate_and_up = keras.layers.Dense(2 * self.hidden, use_bias=False, dtype=policy)
        self.down = keras.layers.Dense(width, use_bias=False, kernel_initializer=last, dtype=policy)
        self.dropout = keras.layers.Dropout(dropout, dtype=policy)

    def build(self, input_shape: tuple[int | None, ...]):
        """Creates the weights for inputs [B, N, width]."""
        self.attention_norm.build(input_shape)
        self.qkv.build(input_shape)
        for norm in self.qk_norms:
            norm.build((*input_shape[:-1], self.head_dim))
        self.attention_output.build(input_shape)
        self.mlp_norm.build(input_shape)
        self.gate_and_up.build(input_shape)
        self.down.build((*input_shape[:-1], self.hidden))

    def call(self, x, training=False):
        """Applies the block to complete sequences.

        Args:
            x: Tensor [B, T, width].
            training: Whether to apply dropout.

        Returns:
            A tensor [B, T, width].
        """
        attention, mlp = self._attention, self._mlp
        if self.remat:
            # Dropout stays outside: its random numbers must not be drawn a second time.
            attention, mlp = keras.remat(attention), keras.remat(mlp)
        x = x + self.dropout(attention(x), training=training)
        return x + self.dropout(mlp(x), training=training)

    def step(self, x, key_cache, value_cache, position):
        """Applies the block to one position, using cached keys and values of earlier positions.

        Args:
            x: Tensor [B, 1, width], the input at `position`.
            key_cache: Rotated keys [B · kv_heads, width / heads, C]; entries at `position` and
                later are ignored.
            value_cache: Values [B · kv_heads, C, width / heads].
            position: int32 scalar in [0, C).

        Returns:
            The output [B, 1, width], and both caches, updated at `position`.
        """
        cos, sin = (
            ops.slice(table, (position, 0), (1, self.head_dim // 2))
            for table in (self.cos, self.sin)
        )
        query, key, value = self._query_keys_values(x, cos, sin)
        key_cache = ops.slice_update(key_cache, (0, 0, position), key)
        value_cache = ops.slice_update(value_cache, (0, position, 0), value)
        past = ops.arange(key_cache.shape[2]) <= position
        x = x + self._attend(query, key_cache, value_cache, past)
        return x + self._mlp(x), key_cache, value_cache

    def empty_caches(self, batch_size: int, length: int) -> tuple:
        """Returns zero-initialized key and value caches for `step`, with C = `length`."""
        rows = batch_size * self.kv_heads
        shapes = (rows, self.head_dim, length), (rows, length, self.head_dim)
        return tuple(ops.zeros(shape, self.compute_dtype) for shape in shapes)

    def _attention(self, x):
        query, keys, values = self._query_keys_values(x, self.cos, self.sin)
        if keras.backend.backend() == "jax" and not on_cpu():
            return self._attend_fused(query, keys, values)
        return self._attend(query, keys, values, np.tri(len(self.cos), dtype=bool))

    def _query_keys_values(self, x, cos, sin):
        """Returns queries [B, H, N, D], keys [B · G, D, N] and values [B · G, N, D].

        Keys are transposed, and batch and heads share an axis: with [B, G, N, D], XLA would copy
        the caches several times per step if B is 1.
        """
        length = x.shape[1]
        qkv = self.qkv(self.attention_norm(x))
        qkv = ops.reshape(qkv, (-1, length, self.heads + 2 * self.kv_heads, self.head_dim))
        ends = self.heads, self.heads + self.kv_heads
        query, key, value = ops.split(ops.transpose(qkv, (0, 2, 1, 3)), ends, axis=1)
        if self.qk_norms:
            query, key = self.qk_norms[0](query), self.qk_norms[1](key)
        keys, values = (
            ops.reshape(each, (-1, length, self.head_dim))
            for each in (rotate(key, cos, sin), value)
        )
        return rotate(query, cos, sin), ops.swapaxes(keys, 1, 2), values

    def _attend(self, query, keys, values, mask):
        # For float32 training on a CPU, this takes two thirds of the time of
        # `ops.dot_product_attention` (benchmarks/choices.py).
        length = query.shape[2]
        scores = ops.matmul(self._grouped(query * self.head_dim**-0.5), keys)
        scores = ops.reshape(scores, (-1, self.heads, length, keys.shape[2]))
        scores = ops.where(mask, ops.cast(scores, "float32"), -1e9)
        weights = self._grouped(ops.cast(ops.softmax(scores), values.dtype))
        attended = ops.matmul(weights, values)
        attended = ops.reshape(attended, (-1, self.heads, length, self.head_dim))
        attended = ops.transpose(attended, (0, 2, 1, 3))  # [B, N, H, D]
        return self.attention_output(ops.reshape(attended, (-1, length, self.width)))

    def _attend_fused(self, query, keys, values):
        # Flash attention (https://arxiv.org/abs/2205.14135) if the GPU has it for the dtype. It
        # never stores the scores, whose size grows with the square of the length.
        length = query.shape[2]
        shape = -1, self.kv_heads, length, self.head_dim
        heads = query, ops.reshape(ops.swapaxes(keys, 1, 2), shape), ops.reshape(values, shape)
        heads = [ops.transpose(each, (0, 2, 1, 3)) for each in heads]  # [B, N, H, D]
        attended = ops.dot_product_attention(*heads, is_causal=True)
        return self.attention_output(ops.reshape(attended, (-1, length, self.width)))

    def _grouped(self, x):
        """Reshapes [B, H, N, C] to [B · G, H / G · N, C], stacking query heads that share keys."""
        return ops.reshape(x, (-1, self.heads // self.kv_heads * x.shape[2], x.shape[3]))

    def _mlp(self, x):
        gate, up = ops.split(self.gate_and_up(self.mlp_norm(x)), 2, axis=-1)
        return self.down(ops.silu(gate) * up)

    def get_config(self) -> dict[str, Any]:
        """Returns the constructor's arguments."""
        own = {
            "layout": dataclasses.asdict(self.layout),
            "width": self.width,
            "heads": self.heads,
            "kv_heads": self.kv_heads,
            "dropout": self.dropout.rate,
            "qk_norm": bool(self.qk_norms),
            "zero_init": self.zero_init,
        }
        return super().get_config() | own


# Grids have only tens of rows. With the base of 10000 used in language models, most pairs would
# hardly be rotated.
BASE = 100.0


def rotary_tables(
    rows: np.ndarray, columns: np.ndarray, head_dim: int
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the cosines and sines that rotate queries and keys by row and column.

    The first half of the pairs is rotated by `row · θ_i`, the second half by `column · θ_i`, where
    `θ_i = BASE^(-i / (head_dim / 4))`. Input 0 is the class token, which has no position on the
    grid and is not rotated. Input p > 0 is code p - 1, rotated by its position on the grid. The
    last code is not an input.

    Rotary embeddings are eq. 34 of Su et al., "RoFormer: Enhanced Transformer with Rotary
    Position Embedding" (https://arxiv.org/abs/2104.09864); the split by axis and the base are the
    axial frequencies of Heo et al., "Rotary Position Embedding for Vision Transformer"
    (https://arxiv.org/abs/2403.13298).

    Args:
        rows: Row of each code, float [T]; fractions are allowed.
        columns: Column of each code, float [T].
        head_dim: Width of an attention head, a multiple of 4.

    Returns:
        Two float32 arrays [T, head_dim / 2], one row per input position.
    """
    frequencies = BASE ** -(np.arange(head_dim // 4) / (head_dim // 4))
    angles = [places[:-1, None] * frequencies for places in (rows, columns)]
    angles = np.concatenate(angles, axis=-1)
    angles = np.concatenate([np.zeros((1, head_dim // 2)), angles])
    return np.cos(angles).astype("float32"), np.sin(angles).astype("float32")


def rotate(x, cos, sin):
    """Rotates the pairs `(x[i], x[i + D/2])` of the last axis by the given angles.

    Args:
        x: Tensor [..., D].
        cos: Cosines of the angles, broadcastable to [..., D / 2].
        sin: Sines of the angles, with the same shape.

    Returns:
        A tensor with the shape and dtype of `x`.
    """
    cos, sin = ops.cast(cos, x.dtype), ops.cast(sin, x.dtype)
    first, second = ops.split(x, 2, axis=-1)
    return ops.concatenate([first * cos - second * sin, first * sin + second * cos], axis=-1)
