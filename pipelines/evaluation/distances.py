"""Fréchet distance and overlap of two sets of images, from their features."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np


class Gaussian(NamedTuple):
    """A normal distribution: `mean` float64 [D] and `covariance` float64 [D, D]."""

    mean: np.ndarray
    covariance: np.ndarray


class Moments:
    """Mean and covariance of features that come in batches, in float64.

    Sums are relative to the mean of the first batch: if features are far from zero, the covariance
    would be the small difference of large sums, and all its digits would be lost.

    Attributes:
        count: Number of features added so far.
    """

    def __init__(self):
        self.count = 0
        self._origin = self._sum = self._products = 0.0

    def add(self, features: np.ndarray) -> None:
        """Adds features, [N, D] of any float dtype, N at least 1."""
        features = np.asarray(features, np.float64)
        if not self.count:
            self._origin = features.mean(axis=0)
        distances = features - self._origin
        self.count += len(features)
        self._sum = self._sum + distances.sum(axis=0)
        self._products = self._products + distances.T @ distances

    def gaussian(self) -> Gaussian:
        """Returns the Gaussian with the features' mean and unbiased covariance.

        Raises:
            ValueError: There are fewer than two features, which have no covariance.
        """
        if self.count < 2:
            raise ValueError(f"a covariance needs at least 2 features, and there are {self.count}")
        mean = self._sum / self.count
        scatter = self._products - self.count * np.outer(mean, mean)
        return Gaussian(self._origin + mean, scatter / (self.count - 1))


def frechet_distance(first: Gaussian, second: Gaussian) -> float:
    """Returns the squared Fréchet distance between two Gaussians, which is 0 if they are equal.

    From "GANs Trained by a Two Time-Scale Update Rule Converge to a Local Nash Equilibrium",
    Heusel et al. 2017 (https://arxiv.org/abs/1706.08500), equation 6:

        ‖m₁ − m₂‖² + Tr(C₁ + C₂ − 2 (C₁ C₂)^½).

    The product C₁ C₂ is not symmetric, but has the eigenvalues of C₁^½ C₂ C₁^½, whose roots are the
    singular values of C₂^½ C₁^½. Since nothing is inverted, covariances may have any rank.
    """
    difference = first.mean - second.mean
    roots = _square_root(second.covariance) @ _square_root(first.covariance)
    overlap = np.linalg.svd(roots, compute_uv=False).sum()
    spread = np.trace(first.covariance) + np.trace(second.covariance) - 2 * overlap
    return max(0.0, float(difference @ difference + spread))  # rounding may leave −1e-15


def _square_root(covariance: np.ndarray) -> np.ndarray:
    values, vectors = np.linalg.eigh(covariance)
    return (vectors * np.sqrt(np.maximum(values, 0.0))) @ vectors.T


NEIGHBOURS = 3
# Number of distances in memory at once: 64 MB in float32.
_BLOCK = 2**24


class Manifold:
    """The union of balls around features, whose radii are the distances to their k-th neighbours.

    Args:
        features: [N, D] of any float dtype, N above `neighbours`.
        neighbours: k.

    Attributes:
        features: The features in float32.
        neighbours: As given.
        radii: The square of each ball's radius, float32 [N].

    Raises:
        ValueError: There are fewer than k + 1 features.
    """

    def __init__(self, features: np.ndarray, neighbours: int = NEIGHBOURS):
        if len(features) <= neighbours:
            raise ValueError(f"{len(features)} features have no {neighbours} neighbours each")
        self.features, self.neighbours = np.asarray(features, np.float32), neighbours
        self.radii = np.empty(len(features), np.float32)
        for rows, distances in _blocks(self.features, self.features):
            own = np.arange(rows.start, rows.stop)
            distances[own - rows.start, own] = np.inf  # a feature is not its own neighbour
            nearest = np.partition(distances, neighbours - 1, axis=1)
            self.radii[rows] = nearest[:, neighbours - 1]


class Overlap(NamedTuple):
    """How far a set of images and the real ones lie within each other's manifolds.

    Attributes:
        precision: Fraction of the set that lies in a ball around a real image.
        recall: Fraction of the real images that lie in a ball around an image of the set.
        density: Mean number of balls around real images that hold an image of the set, divided by
            k; more than 1 if the set crowds where real images are close to each other.
        coverage: Fraction of the real images whose ball holds an image of the set.
    """

    precision: float
    recall: float
    density: float
    coverage: float


def overlap(real: Manifold, other: Manifold) -> Overlap:
    """Returns the overlap of the manifolds of real images and of those to measure.

    Precision and recall are from "Improved Precision and Recall Metric for Assessing Generative
    Models", Kynkäänniemi et al. 2019 (https://arxiv.org/abs/1904.06991), equations 1 and 2; density
    and coverage from "Reliable Fidelity and Diversity Metrics for Generative Models", Naeem et al.
    2020 (https://arxiv.org/abs/2002.09797), equations 4 and 5, which a few images far from all
    others change less. All depend on the number of features, so only values from sets of the same
    size are comparable.
    """
    looks_real = np.empty(len(other.features), bool)
    covered, reached = np.zeros((2, len(real.features)), bool)
    held = 0
    for rows, distances in _blocks(other.features, real.features):
        in_real = distances <= real.radii
        looks_real[rows] = in_real.any(axis=1)
        reached |= in_real.any(axis=0)
        held += int(in_real.sum())
        covered |= (distances <= other.radii[rows, None]).any(axis=0)
    return Overlap(
        precision=float(looks_real.mean()),
        recall=float(covered.mean()),
        density=held / (real.neighbours * len(other.features)),
        coverage=float(reached.mean()),
    )


def nearest(ones: np.ndarray, others: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the distance from each of `ones` to the nearest of `others`, and the latter's row.

    Args:
        ones: Features, float32 [N, D].
        others: Features, float32 [M, D].

    Returns:
        Euclidean distances float32 [N], and rows of `others`, integers [N].
    """
    rows = np.empty(len(ones), np.int64)
    squares = np.empty(len(ones), np.float32)
    for part, distances in _blocks(ones, others):
        rows[part] = distances.argmin(axis=1)
        squares[part] = distances.min(axis=1)
    return np.sqrt(squares), rows


def _blocks(ones: np.ndarray, others: np.ndarray) -> Iterator[tuple[slice, np.ndarray]]:
    """Yields blocks of rows of `ones`, and their squared distances to all of `others`."""
    # If features are far from zero, the difference of the squares below would lose its digits.
    centre = others.mean(axis=0, dtype=np.float64).astype(np.float32)
    ones, others = ones - centre, others - centre
    squares = np.square(others).sum(axis=1)
    size = max(1, _BLOCK // len(others))
    for first in range(0, len(ones), size):
        block = ones[first : first + size]
        distances = np.square(block).sum(axis=1)[:, None] + squares - 2 * block @ others.T
        yield slice(first, first + len(block)), np.maximum(distances, 0)
