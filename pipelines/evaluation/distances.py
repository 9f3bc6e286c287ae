"""The Fréchet distance between two sets of images, by Gaussians fitted to their features."""

from typing import NamedTuple

import numpy as np


class Gaussian(NamedTuple):
    """A normal distribution: `mean` float64 [D] and `covariance` float64 [D, D]."""

    mean: np.ndarray
    covariance: np.ndarray


class Moments:
    """Mean and covariance of features that come in batches, in float64.

    Sums are of distances from the mean of the first batch: where features lie far from zero, the
    sums of their squares would cancel out all digits of the covariance.

    Attributes:
        count: Features added so far.
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
    """Returns the squared Fréchet distance between two Gaussians, 0 for equal ones.

    From "GANs Trained by a Two Time-Scale Update Rule Converge to a Local Nash Equilibrium",
    Heusel et al. 2017 (https://arxiv.org/abs/1706.08500), equation 6:

        ‖m₁ − m₂‖² + Tr(C₁ + C₂ − 2 (C₁ C₂)^½).

    The product is not symmetric, but has the eigenvalues of C₁^½ C₂ C₁^½; their roots are the
    singular values of C₂^½ C₁^½. So covariances of any rank are taken, and nothing is divided by.
    """
    difference = first.mean - second.mean
    roots = _square_root(second.covariance) @ _square_root(first.covariance)
    overlap = np.linalg.svd(roots, compute_uv=False).sum()
    spread = np.trace(first.covariance) + np.trace(second.covariance) - 2 * overlap
    return max(0.0, float(difference @ difference + spread))  # rounding may leave −1e-15


def _square_root(covariance: np.ndarray) -> np.ndarray:
    values, vectors = np.linalg.eigh(covariance)
    return (vectors * np.sqrt(np.maximum(values, 0.0))) @ vectors.T
