"""Predictive quantization: most of a grid is guessed from cells that are quantized already."""

import keras
import numpy as np
from keras import layers, ops

from vqvae.quantizers.base import Quantized, Quantizer
from vqvae.quantizers.vector import VectorQuantizer


@keras.saving.register_keras_serializable("vqbeam")
class PredictiveQuantizer(Quantizer):
    """Quantizes a grid in three turns, each of what the turns before it cannot predict.

    Neighbouring vectors of an image are alike, and a vector quantizer spends its codes on saying so
    again and again. Here a quarter of the cells, at even rows and columns, is quantized as it is;
    the quarter at odd rows and columns after a 3×3 convolution of the first has been subtracted;
    and the other half after one of both. What is predicted from is quantized, so that a decoder
    that knows the codes repeats the predictions exactly: the closed loop of predictive coding
    (Gersho and Gray 1991, Vector Quantization and Signal Compression, chapter 13), in an order like
    the checkerboard of He et al. 2021 (https://arxiv.org/abs/2103.15306).

    All turns share one codebook. The predictions learn from the commitment loss, which makes what
    is left small; the reconstruction's gradient passes them by, on its way to z.

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
                code_dim, 3, padding="same", kernel_initializer="zeros", dtype=self.dtype_policy
            )
            for _ in range(2)
        ]

    @property
    def vector(self):
        """The one quantizer of all turns."""
        return self.quantizers[0]

    def build(self, input_shape):
        """Creates the codebook and the convolutions; the last axis must be `code_dim`."""
        super().build(input_shape)
        self.vector.build(input_shape)
        for convolution in self.predictions:
            convolution.build(input_shape)

    def call(self, z, training=False):
        """Quantizes z of [B, h, w, D]; in training the statistics move, after the assignment."""
        cells, turns = _cells(ops.cast(z, "float32")), _turns(z)
        inputs, results = [], []

        def quantize(turn, predicted):
            inputs.append(ops.take(cells, turn, axis=1) - predicted)
            results.append(self.vector(inputs[-1], training=False))
            return results[-1].quantized

        quantized = self._in_turns(quantize, z)
        codes = ops.concatenate([result.codes for result in results], axis=1)
        if training:  # after all turns have chosen: what one predicts is by the old codebook
            self.vector.update_statistics(ops.concatenate(inputs, axis=1), codes)
        shares = [len(turn) / sum(map(len, turns)) for turn in turns]
        return Quantized(
            quantized,
            _on_grid(codes, z),
            _weighted(shares, [result.losses for result in results]),
            _weighted(shares, [result.statistics for result in results]),
        )

    def encode(self, z):
        """Returns the codes [B, h, w] int32 of z [B, h, w, D]; no gradient."""
        z = ops.stop_gradient(ops.cast(z, "float32"))
        cells, codes = _cells(z), []

        def quantize(turn, predicted):
            codes.append(self.vector.encode(ops.take(cells, turn, axis=1) - predicted))
            return self.vector.decode_codes(codes[-1])

        self._in_turns(quantize, z)
        return _on_grid(ops.concatenate(codes, axis=1), z)

    def decode_codes(self, codes):
        """Returns the vectors [B, h, w, D] float32 of codes [B, h, w] in [0, num_codes)."""
        flat = _cells(codes)

        def quantize(turn, predicted):
            del predicted
            return self.vector.decode_codes(ops.take(flat, turn, axis=1))

        return self._in_turns(quantize, codes)

    def _in_turns(self, quantize, like):
        """Returns a grid [B, h, w, D], of what each turn's cells are guessed to be and `quantize`.

        Args:
            quantize: Function from the places of a turn's cells and what they are guessed to be,
                [B, n, D], to what is to be added.
            like: A tensor [B, h, w, ...], for the shape of the grid.
        """
        turns, known, guess = _turns(like), [], 0.0
        for number, turn in enumerate(turns):
            if number:
                grid = _on_grid(_with_zeros(known, turns[number:]), like)
                guess = _cells(self.predictions[number - 1](ops.stop_gradient(grid)))
                guess = ops.take(guess, turn, axis=1)
            known.append(guess + quantize(turn, guess))
        return _on_grid(ops.concatenate(known, axis=1), like)

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


def _turns(grid):
    """Returns the places of each turn's cells in raster order, from a tensor [B, h, w, ...]."""
    rows, columns = np.indices(grid.shape[1:3]) % 2
    turn = np.where(rows != columns, 2, rows).ravel()
    return [np.flatnonzero(turn == number) for number in range(3)]


def _cells(grid):
    """Returns a tensor [B, h, w, ...] as [B, h·w, ...]."""
    return ops.reshape(grid, (-1, grid.shape[1] * grid.shape[2], *grid.shape[3:]))


def _on_grid(cells, like):
    """Returns cells [B, h·w, ...] in the order of the turns as a grid [B, h, w, ...]."""
    cells = ops.take(cells, np.argsort(np.concatenate(_turns(like))), axis=1)
    return ops.reshape(cells, (-1, *like.shape[1:3], *cells.shape[2:]))


def _with_zeros(known, turns):
    """Returns the cells known so far, with zeros for those of the turns to come."""
    missing = sum(map(len, turns))
    known = ops.concatenate(known, axis=1)
    return ops.pad(known, ((0, 0), (0, missing), (0, 0)))


def _weighted(shares, of_turns):
    """Returns means over all cells, by name, from those over the cells of each turn."""
    # A grid of one cell has turns without any, whose means are not numbers.
    pairs = [(share, means) for share, means in zip(shares, of_turns, strict=True) if share]
    return {name: sum(share * means[name] for share, means in pairs) for name in of_turns[0]}
