"""Predictive quantization: most of a grid is guessed from cells that are quantized already."""

import functools
from typing import NamedTuple

import keras
import numpy as np
from keras import layers, ops

from vqbeam.vqvae.quantizers.base import Quantized, Quantizer
from vqbeam.vqvae.quantizers.vector import VectorQuantizer

# Where the cells lie from which one is guessed, by (rows, columns): they are quantized already.
_CORNERS = ((-1, -1), (-1, 1), (1, -1), (1, 1))
_SIDES = ((-1, 0), (0, -1), (0, 1), (1, 0))


@keras.saving.register_keras_serializable("vqbeam")
class PredictiveQuantizer(Quantizer):
    """Quantizes a grid in three turns, each of what the turns before it cannot predict.

    Neighbouring vectors of an image are alike, and a vector quantizer spends its codes on saying so
    again and again. Here a quarter of the cells, at even rows and columns, is quantized as it is;
    the quarter at odd rows and columns after a linear guess from the four of the first at its
    corners has been subtracted; and the other half after a guess from the four at its sides, two of
    each quarter. What is guessed from is quantized, so that a decoder that knows the codes repeats
    the guesses exactly: the closed loop of predictive coding (Gersho and Gray 1991, Vector
    Quantization and Signal Compression, chapter 13), in an order like the checkerboard of He et al.
    2021 (https://arxiv.org/abs/2103.15306).

    All turns share one codebook. The predictions learn from the commitment loss, which makes what
    is left small. With the straight-through estimator the reconstruction's gradient passes them by,
    on its way to z; "diveq" and "rotation" give z another gradient than the quantized vector has,
    and the predictions get the difference, "diveq" that along the error.

    Args:
        num_codes: Codebook size K.
        code_dim: Length D of a vector; the last axis of the input, a grid [B, h, w, D].
        **settings: What else `VectorQuantizer` takes.
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
        # At zero, training begins with a plain vector quantizer.
        self.predictions = [
            layers.Conv2D(
                code_dim, (1, len(near)), kernel_initializer="zeros", dtype=self.dtype_policy
            )
            for near in (_CORNERS, _SIDES)
        ]

    @property
    def vector(self):
        """The one quantizer of all turns."""
        return self.quantizers[0]

    def build(self, input_shape):
        """Creates the codebook and the predictions; the last axis must be `code_dim`."""
        super().build(input_shape)
        self.vector.build(input_shape)
        for prediction in self.predictions:
            prediction.build((None, None, prediction.kernel_size[1], self.dim))

    def call(self, z, training=False):
        """Quantizes z of [B, h, w, D]; in training the statistics move, after the assignment."""
        cells, inputs, results = _cells(ops.cast(z, "float32")), [], []

        def quantize(turn, guess):
            inputs.append(ops.take(cells, turn.places, axis=1) - guess)
            results.append(self.vector(inputs[-1], training=False))
            return results[-1].quantized

        quantized = self._in_turns(quantize, z)
        codes = ops.concatenate([result.codes for result in results], axis=1)
        if training:  # after all turns have chosen: what one predicts is by the old codebook
            self.vector.update_statistics(ops.concatenate(inputs, axis=1), codes)
        shares = [len(turn.places) / cells.shape[1] for turn in _turns_of(z)]
        return Quantized(
            quantized,
            _on_grid(codes, z),
            _weighted(shares, [result.losses for result in results]),
            _weighted(shares, [result.statistics for result in results]),
        )

    def decode_codes(self, codes):
        """Returns the vectors [B, h, w, D] float32 of codes [B, h, w] in [0, num_codes)."""
        cells = _cells(codes)

        def quantize(turn, guess):
            del guess
            return self.vector.decode_codes(ops.take(cells, turn.places, axis=1))

        return self._in_turns(quantize, codes)

    def _in_turns(self, quantize, like):
        """Returns a grid [B, h, w, D]: of each cell what it is guessed to be and what is added.

        Args:
            quantize: Function from a turn and what its cells are guessed to be, [B, n, D], to what
                is to be added.
            like: A tensor [B, h, w, ...], for the shape of the grid.
        """
        first, *others = _turns_of(like)
        known = quantize(first, 0.0)
        for turn, prediction in zip(others, self.predictions, strict=True):
            # One more cell, of zeros, stands for all that lie beyond the edge.
            padded = ops.pad(ops.stop_gradient(known), ((0, 0), (0, 1), (0, 0)))
            near = ops.take(padded, np.minimum(turn.near, known.shape[1]), axis=1)
            guess = prediction(near)[:, :, 0]
            known = ops.concatenate([known, guess + quantize(turn, guess)], axis=1)
        return _on_grid(known, like)

    def initialize(self, vectors, method, seed):
        """Places the codebook; see `Quantizer`. There are no predictions yet."""
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
    """The cells of one turn.

    Attributes:
        places: int [n], where they are in raster order.
        near: int [n, 4], which cells they are guessed from, by number in the order of the turns; a
            number past all cells is beyond the edge.
    """

    places: np.ndarray
    near: np.ndarray


def _turns_of(grid) -> list[_Turn]:
    return _turns(*grid.shape[1:3])


@functools.cache
def _turns(height: int, width: int) -> list[_Turn]:
    """Returns the three turns of a grid."""
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
    """Returns a tensor [B, h, w, ...] as [B, h·w, ...]."""
    return ops.reshape(grid, (-1, grid.shape[1] * grid.shape[2], *grid.shape[3:]))


def _on_grid(cells, like):
    """Returns cells [B, h·w, ...] in the order of the turns as a grid [B, h, w, ...]."""
    order = np.concatenate([turn.places for turn in _turns_of(like)])
    cells = ops.take(cells, np.argsort(order), axis=1)
    return ops.reshape(cells, (-1, *like.shape[1:3], *cells.shape[2:]))


def _weighted(shares, of_turns):
    """Returns means over all cells, by name, from those over the cells of each turn."""
    # A grid of one cell has turns without any, whose means are not numbers.
    pairs = [(share, means) for share, means in zip(shares, of_turns, strict=True) if share]
    return {name: sum(share * means[name] for share, means in pairs) for name in of_turns[0]}
