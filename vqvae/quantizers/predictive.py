"""Predictive quantization: most cells are predicted from neighbours quantized before them."""

import functools
from typing import NamedTuple

import keras
import numpy as np
from keras import layers, ops

from vqbeam.vqvae.quantizers.base import Quantized, Quantizer
from vqbeam.vqvae.quantizers.vector import VectorQuantizer

# Offsets (rows, columns) of the quantized neighbours from which a cell is predicted.
_CORNERS = ((-1, -1), (-1, 1), (1, -1), (1, 1))
_SIDES = ((-1, 0), (0, -1), (0, 1), (1, 0))


@keras.saving.register_keras_serializable("vqbeam")
class PredictiveQuantizer(Quantizer):
    """Quantizes a grid in three steps, subtracting a prediction from the earlier steps.

    Neighbouring vectors of an image are similar, so a plain vector quantizer spends much of its
    capacity on redundant information. Here, the cells at even rows and columns (a quarter) are
    quantized directly. The cells at odd rows and columns (a quarter) are quantized after
    subtracting a linear prediction from their four diagonal neighbours, and the remaining half
    after subtracting one from their four direct neighbours. All predictions use quantized
    vectors, so the decoder can reproduce them exactly from the codes. This is closed-loop
    predictive coding (Gersho and Gray 1991, Vector Quantization and Signal Compression, chapter
    13), in an order similar to the checkerboard of He et al. 2021
    (https://arxiv.org/abs/2103.15306).

    All steps share one codebook. The predictions are trained by the commitment loss, which makes
    the residuals small. With the straight-through estimator, the gradient of the reconstruction
    bypasses them on its way to z. With "diveq" and "rotation", the gradients for z and for the
    quantized vector differ, and the predictions receive the difference; with "diveq", that is the
    component along the error.

    Args:
        num_codes: Codebook size K.
        code_dim: Length D of a vector. The input is a grid [B, h, w, D].
        **settings: Other arguments of `VectorQuantizer`.

    Raises:
        ValueError: `lookup` is "cosine".
    """

    def __init__(self, num_codes, code_dim, **settings):
        own = {key: settings.pop(key) for key in ("name", "trainable") if key in settings}
        settings.pop("dtype", None)
        super().__init__(**own)
        if settings.get("lookup", "l2") != "l2":
            raise ValueError("lookup is 'cosine', but what is left has a length; use 'l2'")
        self.num_codes = num_codes
        self.dim = code_dim
        self.settings = settings
        self.quantizers = [VectorQuantizer(num_codes, code_dim, **settings)]
        self.loss_names = self.vector.loss_names
        # Zeros, so that training starts from a plain vector quantizer.
        self.predictions = [
            layers.Conv2D(
                code_dim, (1, len(near)), kernel_initializer="zeros", dtype=self.dtype_policy
            )
            for near in (_CORNERS, _SIDES)
        ]

    @property
    def vector(self):
        """The quantizer shared by all steps."""
        return self.quantizers[0]

    def build(self, input_shape):
        """Creates the codebook and the predictions; the input's last axis must be `code_dim`."""
        super().build(input_shape)
        self.vector.build(input_shape)
        for prediction in self.predictions:
            prediction.build((None, None, prediction.kernel_size[1], self.dim))

    def call(self, z, training=False):
        """Quantizes z [B, h, w, D]; in training, statistics are updated after all steps."""
        cells, inputs, results = _cells(ops.cast(z, "float32")), [], []

        def quantize(turn, guess):
            inputs.append(ops.take(cells, turn.places, axis=1) - guess)
            results.append(self.vector(inputs[-1], training=False))
            return results[-1].quantized

        quantized = self._in_turns(quantize, z)
        codes = ops.concatenate([result.codes for result in results], axis=1)
        if training and self.trainable:  # at the end, since all steps must use the same codebook
            self.vector.update_statistics(ops.concatenate(inputs, axis=1), codes)
        shares = [len(turn.places) / cells.shape[1] for turn in _turns_of(z)]
        return Quantized(
            quantized,
            _on_grid(codes, z),
            _weighted(shares, [result.losses for result in results]),
            _weighted(shares, [result.statistics for result in results]),
        )

    def decode_codes(self, codes):
        """Returns the float32 vectors [B, h, w, D] for codes [B, h, w] in [0, num_codes)."""
        cells = _cells(codes)

        def quantize(turn, guess):
            del guess
            return self.vector.decode_codes(ops.take(cells, turn.places, axis=1))

        return self._in_turns(quantize, codes)

    def _in_turns(self, quantize, like):
        """Returns a grid [B, h, w, D] with the sum of prediction and quantized residual per cell.

        Args:
            quantize: Function that takes a step and the predictions for its cells, [B, n, D], and
                returns their quantized residuals, [B, n, D].
            like: A tensor [B, h, w, ...] with the shape of the grid.
        """
        first, *others = _turns_of(like)
        known = quantize(first, 0.0)
        for turn, prediction in zip(others, self.predictions, strict=True):
            # An extra cell of zeros represents all cells outside the grid.
            padded = ops.pad(ops.stop_gradient(known), ((0, 0), (0, 1), (0, 0)))
            near = ops.take(padded, np.minimum(turn.near, known.shape[1]), axis=1)
            guess = prediction(near)[:, :, 0]
            known = ops.concatenate([known, guess + quantize(turn, guess)], axis=1)
        return _on_grid(known, like)

    def initialize(self, vectors, method, seed):
        """Initializes the codebook; see `Quantizer.initialize`. Predictions are still zero."""
        self.vector.initialize(vectors, method, seed)

    def get_config(self):
        """Returns the constructor's arguments."""
        return {
            **super().get_config(),
            "num_codes": self.num_codes,
            "code_dim": self.dim,
            **self.settings,
        }


class _Turn(NamedTuple):
    """The cells of one step.

    Attributes:
        places: int [n], their indices in raster order.
        near: int [n, 4], the indices, in step order, of the cells used to predict each ([n, 0] in
            the first step); h·w for cells outside the grid.
    """

    places: np.ndarray
    near: np.ndarray


def _turns_of(grid) -> list[_Turn]:
    return _turns(*grid.shape[1:3])


@functools.cache
def _turns(height: int, width: int) -> list[_Turn]:
    """Returns the three steps for a grid."""
    rows, columns = np.indices((height, width)).reshape(2, -1)
    number = np.where(rows % 2 != columns % 2, 2, rows % 2)
    order = np.argsort(np.argsort(number, kind="stable"))
    order = np.pad(order.reshape(height, width), 1, constant_values=height * width)
    turns = []
    for turn, offsets in enumerate(((), _CORNERS, _SIDES)):
        places = np.flatnonzero(number == turn)
        near = [order[rows[places] + 1 + dy, columns[places] + 1 + dx] for dy, dx in offsets]
        turns.append(_Turn(places, np.array(near, int).reshape(len(offsets), len(places)).T))
    return turns


def _cells(grid):
    """Returns a tensor [B, h, w, ...] reshaped to [B, h·w, ...]."""
    return ops.reshape(grid, (-1, grid.shape[1] * grid.shape[2], *grid.shape[3:]))


def _on_grid(cells, like):
    """Returns cells [B, h·w, ...] in step order as a grid [B, h, w, ...]."""
    order = np.concatenate([turn.places for turn in _turns_of(like)])
    cells = ops.take(cells, np.argsort(order), axis=1)
    return ops.reshape(cells, (-1, *like.shape[1:3], *cells.shape[2:]))


def _weighted(shares, of_turns):
    """Returns means over all cells, by name, from the means over the cells of each step."""
    # In a grid of one cell, some steps are empty and their means are NaN.
    pairs = [(share, means) for share, means in zip(shares, of_turns, strict=True) if share]
    return {name: sum(share * means[name] for share, means in pairs) for name in of_turns[0]}
