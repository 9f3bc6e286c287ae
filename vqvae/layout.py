"""The order of an image's codes in one sequence, shared by both stages and the records."""

import dataclasses
import math
from typing import Any

import numpy as np

from vqbeam.configs import Config


@dataclasses.dataclass(frozen=True)
class CodeLayout:
    """The order, levels and positions of the codes of one image.

    Grids are concatenated, each in raster order, and the codes of one position are adjacent. A code
    therefore comes after the codes that it refines.

    Example:
        >>> CodeLayout(512, ((8, 8),)).shape
        (8, 8)
        >>> CodeLayout(512, ((8, 8),), depth=4).shape
        (8, 8, 4)
        >>> CodeLayout(512, ((4, 4), (8, 8))).shape
        (80,)

    Attributes:
        num_codes: Codebook size K of each level.
        grids: Rows and columns of each grid, from coarse to fine.
        depth: Number of codes per position; must be 1 if there are several grids.

    Raises:
        ValueError: There is no grid, or there are several grids and `depth` is above 1.
    """

    num_codes: int
    grids: tuple[tuple[int, int], ...]
    depth: int = 1

    def __post_init__(self):
        # JSON has only lists, which never compare equal to tuples.
        object.__setattr__(self, "grids", tuple((rows, columns) for rows, columns in self.grids))
        if not self.grids or (len(self.grids) > 1 and self.depth > 1):
            raise ValueError(
                f"grids {self.grids} with {self.depth} codes at each position are not supported; "
                "use one grid, or several with 1"
            )

    @classmethod
    def of(cls, layout: "CodeLayout | dict[str, Any]") -> "CodeLayout":
        """Returns `layout`, converted if it is a dictionary of its fields, as Keras stores it."""
        return layout if isinstance(layout, cls) else cls(**layout)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of an image's codes: (h, w), (h, w, depth), or (T,) for several grids.

        Flattening such an array in C order gives the sequence.
        """
        if len(self.grids) > 1:
            return (self.length,)
        return self.grids[0] if self.depth == 1 else (*self.grids[0], self.depth)

    @property
    def length(self) -> int:
        """Number of codes T of an image."""
        return sum(self._lengths)

    @property
    def levels(self) -> int:
        """Number of codebooks: `depth`, or the number of grids."""
        return max(self.depth, len(self.grids))

    @property
    def level(self) -> np.ndarray:
        """Level of each code in the sequence, int32 [T] in [0, levels)."""
        if self.depth > 1:
            return np.tile(np.arange(self.depth, dtype="int32"), self.length // self.depth)
        return np.repeat(np.arange(self.levels, dtype="int32"), self._lengths)

    @property
    def rows(self) -> np.ndarray:
        """Row of the centre of each code's cell, float32 [T], in units of the last grid's cells."""
        return self._places(axis=0)

    @property
    def columns(self) -> np.ndarray:
        """Column of each code, float32 [T], in the same units as `rows`."""
        return self._places(axis=1)

    @property
    def _lengths(self) -> list[int]:
        return [math.prod(grid) * self.depth for grid in self.grids]

    def _places(self, axis: int) -> np.ndarray:
        places = []
        for grid in self.grids:
            scale = self.grids[-1][axis] / grid[axis]
            centres = (np.indices(grid)[axis] + 0.5) * scale - 0.5
            places.append(np.repeat(centres, self.depth))
        return np.concatenate(places).astype("float32")

    def split(self, codes) -> list:
        """Splits codes by grid.

        Args:
            codes: Integer tensor [B, *shape].

        Returns:
            A list with one tensor per grid, [B, h, w], or [B, h, w, depth] if depth is above 1.
        """
        from keras import ops  # imported here, so that `describe` need not wait for Keras

        if len(self.grids) == 1:
            return [codes]
        parts = ops.split(codes, np.cumsum(self._lengths)[:-1].tolist(), axis=1)
        return [
            ops.reshape(part, (-1, *grid)) for part, grid in zip(parts, self.grids, strict=True)
        ]

    def join(self, parts: list):
        """Returns codes [B, *shape] from a list of codes per grid; the inverse of `split`."""
        from keras import ops

        if len(self.grids) == 1:
            return parts[0]
        return ops.concatenate(
            [
                ops.reshape(part, (-1, length))
                for part, length in zip(parts, self._lengths, strict=True)
            ],
            axis=1,
        )

    def describe(self) -> str:
        """Returns a short description, such as "8×8 grid of 4 codes each, K = 512"."""
        grids = " and ".join(f"{rows}×{columns}" for rows, columns in self.grids)
        noun = "grid" if len(self.grids) == 1 else "grids"
        each = f" of {self.depth} codes each" if self.depth > 1 else ""
        return f"{grids} {noun}{each}, K = {self.num_codes}"


def code_layout(config: Config) -> CodeLayout:
    """Returns the layout of a run's codes."""
    (rows, columns), settings = config.grid, config.vqvae
    grids = ((rows, columns),) if settings.grids == 1 else ((rows // 2, columns // 2), config.grid)
    return CodeLayout(settings.num_codes, grids, settings.depth)
