"""Precision and recall of images, by the manifolds that their features span."""

from collections.abc import Iterator

import numpy as np

NEIGHBOURS = 3
# Distances that are held at once: 64 MB of them, in float32.
_BLOCK = 2**24


class Manifold:
    """The union of balls around features, each as wide as the way to its k-th neighbour.

    Args:
        features: [N, D] of any float dtype, N above `neighbours`.
        neighbours: k.

    Attributes:
        features: The same, float32.
        radii: The square of each ball's radius, float32 [N].

    Raises:
        ValueError: There are no k neighbours.
    """

    def __init__(self, features: np.ndarray, neighbours: int = NEIGHBOURS):
        if len(features) <= neighbours:
            raise ValueError(f"{len(features)} features have no {neighbours} neighbours each")
        self.features = np.asarray(features, np.float32)
        self.radii = np.empty(len(features), np.float32)
        for rows, distances in _blocks(self.features, self.features):
            own = np.arange(rows.start, rows.stop)
            distances[own - rows.start, own] = np.inf  # none is its own neighbour
            nearest = np.partition(distances, neighbours - 1, axis=1)
            self.radii[rows] = nearest[:, neighbours - 1]


def precision_recall(real: Manifold, other: Manifold) -> tuple[float, float]:
    """Returns which share of each set lies within the manifold of the other one.

    From "Improved Precision and Recall Metric for Assessing Generative Models", Kynkäänniemi et
    al. 2019 (https://arxiv.org/abs/1904.06991), equations 1 and 2. Both grow with the number of
    features: compare sets of one size only, and figures that were measured with as many.

    Args:
        real: Of the data.
        other: Of what is to be measured.

    Returns:
        Precision, the share of `other` that looks real; and recall, the share of `real` that
        `other` covers.
    """
    looks_real = np.empty(len(other.features), bool)
    covered = np.zeros(len(real.features), bool)
    for rows, distances in _blocks(other.features, real.features):
        looks_real[rows] = (distances <= real.radii).any(axis=1)
        covered |= (distances <= other.radii[rows, None]).any(axis=0)
    return float(looks_real.mean()), float(covered.mean())


def _blocks(ones: np.ndarray, others: np.ndarray) -> Iterator[tuple[slice, np.ndarray]]:
    """Yields the rows of a block of `ones`, and their squared distances to all of `others`."""
    # Far from zero, the squares below would cancel out the digits of their difference.
    centre = others.mean(axis=0, dtype=np.float64).astype(np.float32)
    ones, others = ones - centre, others - centre
    squares = np.square(others).sum(axis=1)
    size = max(1, _BLOCK // len(others))
    for first in range(0, len(ones), size):
        block = ones[first : first + size]
        distances = np.square(block).sum(axis=1)[:, None] + squares - 2 * block @ others.T
        yield slice(first, first + len(block)), np.maximum(distances, 0)
