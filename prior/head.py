"""The last layer of the prior: a matrix of logits for each level of codes."""

import dataclasses
from typing import Any

import keras
import numpy as np
from keras import ops

from vqbeam.vqvae.layout import CodeLayout


@keras.saving.register_keras_serializable("vqbeam")
class LevelHead(keras.layers.Layer):
    """Maps each position by the matrix of the level of its code, one of [width, K] for each level.

    The matrices start at zero, so that an untrained model has a loss of exactly log K.

    Args:
        layout: How the codes of an image lie in one sequence.
    """

    def __init__(self, layout: CodeLayout, **kwargs: Any):
        super().__init__(**kwargs)
        self.layout = CodeLayout.of(layout)

    def build(self, input_shape: tuple[int | None, ...]):
        """Creates the weights, for inputs [B, N, width]."""
        shape = (self.layout.levels, input_shape[-1], self.layout.num_codes)
        self.kernel = self.add_weight(shape=shape, initializer="zeros", name="kernel")

    def call(self, x, position=None):
        """Returns the logits of a whole sequence, or of one position.

        Args:
            x: Tensor [B, T, width], or [B, 1, width] of one position.
            position: int32 scalar in [0, T), which position that is; None for all.

        Returns:
            A tensor [B, T, K], or [B, 1, K] of one position.
        """
        if self.layout.levels == 1:
            return ops.matmul(x, ops.unstack(self.kernel.value)[0])
        if position is not None:
            return self._at(x, position)
        return self._by_depth(x) if self.layout.depth > 1 else self._by_grid(x)

    def _at(self, x, position):
        level = ops.take(self.layout.level, position)
        return ops.matmul(x, ops.take(self.kernel, level, axis=0))

    def _by_depth(self, x):
        layout, (_, width, num_codes) = self.layout, self.kernel.shape
        x = ops.reshape(x, (-1, layout.length // layout.depth, layout.depth, width))
        logits = ops.einsum("bpdw,dwk->bpdk", x, self.kernel)
        return ops.reshape(logits, (-1, layout.length, num_codes))

    def _by_grid(self, x):
        bounds = np.flatnonzero(np.diff(self.layout.level)) + 1
        parts = ops.split(x, bounds.tolist(), axis=1)
        matrices = ops.unstack(self.kernel.value)
        return ops.concatenate(
            [ops.matmul(part, matrix) for part, matrix in zip(parts, matrices, strict=True)],
            axis=1,
        )

    def get_config(self) -> dict[str, Any]:
        """Returns the constructor's arguments."""
        return super().get_config() | {"layout": dataclasses.asdict(self.layout)}
