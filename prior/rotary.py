"""Rotary position embeddings for codes that lie on grids."""

import numpy as np
from keras import ops

# A grid has tens of rows, not thousands of words: with the base 10000 of language models most
# pairs would hardly turn at all.
BASE = 100.0


def rotary_tables(
    rows: np.ndarray, columns: np.ndarray, head_dim: int
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the cosines and sines that rotate queries and keys by row and column.

    The first half of the pairs turns by `row · θ_i`, the second half by `column · θ_i`, where
    `θ_i = BASE^(-i / (head_dim / 4))`. Input 0 is the class token, which has no place on the grid
    and is not rotated; input p > 0 carries code p - 1 and turns by its place. The last code is no
    input.

    Rotary embeddings are eq. 34 of Su et al., "RoFormer: Enhanced Transformer with Rotary
    Position Embedding" (https://arxiv.org/abs/2104.09864); the split by axis and the base are the
    axial frequencies of Heo et al., "Rotary Position Embedding for Vision Transformer"
    (https://arxiv.org/abs/2403.13298).

    Args:
        rows: Row of each code, float [T], whole or not.
        columns: Column of each code, float [T].
        head_dim: Width of an attention head, a multiple of 4.

    Returns:
        Two float32 arrays [T, head_dim / 2], one row for each input position.
    """
    frequencies = BASE ** -(np.arange(head_dim // 4) / (head_dim // 4))
    angles = [places[:-1, None] * frequencies for places in (rows, columns)]
    angles = np.concatenate(angles, axis=-1)
    angles = np.concatenate([np.zeros((1, head_dim // 2)), angles])
    return np.cos(angles).astype("float32"), np.sin(angles).astype("float32")


def rotate(x, cos, sin):
    """Rotates the pairs `(x[i], x[i + D/2])` of the last axis by the angles of the tables.

    Args:
        x: Tensor [..., D].
        cos: Cosines, broadcastable to [..., D / 2].
        sin: Sines of the same shape.

    Returns:
        A tensor with the shape and dtype of `x`.
    """
    cos, sin = ops.cast(cos, x.dtype), ops.cast(sin, x.dtype)
    first, second = ops.split(x, 2, axis=-1)
    return ops.concatenate([first * cos - second * sin, first * sin + second * cos], axis=-1)
