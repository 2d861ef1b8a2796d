"""The Fréchet distance between two sets of features, each modelled as a Gaussian (Heusel et al. 2017, eq. 6)."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from pixart.evaluate.interval import Estimate, jackknife


@dataclass(frozen=True)
class Moments:
    mean: np.ndarray  # (D,) float64
    covariance: np.ndarray  # (D, D) float64, divided by n - 1

    @cached_property
    def root(self) -> np.ndarray:
        """The square root of the covariance."""
        return square_root(self.covariance)


@dataclass(frozen=True)
class Sums:
    """Sums from which moments are computed, so that groups of images can be subtracted."""

    count: int
    first: np.ndarray  # (D,)
    second: np.ndarray  # (D, D)

    @classmethod
    def of(cls, features: np.ndarray, shift: np.ndarray) -> "Sums":
        """Sums of features minus `shift`; without the shift, a large mean would cost precision."""
        x = features.astype(np.float64) - shift
        return cls(len(x), x.sum(0), x.T @ x)

    def __sub__(self, other: "Sums") -> "Sums":
        return Sums(self.count - other.count, self.first - other.first, self.second - other.second)

    def moments(self, shift: np.ndarray) -> Moments:
        mean = self.first / self.count
        covariance = (self.second - self.count * np.outer(mean, mean)) / (self.count - 1)
        return Moments(mean + shift, covariance)


def moments(features: np.ndarray) -> Moments:
    """Mean and covariance of features (N, D), N at least 2."""
    shift = features.mean(0, dtype=np.float64)
    return Sums.of(features, shift).moments(shift)


def frechet_distance(a: Moments, b: Moments) -> float:
    """|μa − μb|² + tr(Σa + Σb − 2 (Σa Σb)^½)."""
    # Σa Σb and √Σb Σa √Σb have the same eigenvalues, and the latter is symmetric
    eigenvalues = np.linalg.eigvalsh(b.root @ a.covariance @ b.root)
    cross = np.sqrt(np.clip(eigenvalues, 0, None)).sum()
    offset = a.mean - b.mean
    return float(offset @ offset + np.trace(a.covariance) + np.trace(b.covariance) - 2 * cross)


def distance_of_few(features: np.ndarray, reference: Moments) -> float:
    """The same for N ≤ D features (N, D), from the N × N product matrix, which has the same non-zero eigenvalues."""
    x = features.astype(np.float64)
    offset = x.mean(0) - reference.mean
    x = (x - x.mean(0)) / np.sqrt(len(x) - 1)
    across = x @ reference.root
    eigenvalues = np.linalg.eigvalsh(across @ across.T)
    cross = np.sqrt(np.clip(eigenvalues, 0, None)).sum()
    return float(offset @ offset + (x * x).sum() + np.trace(reference.covariance) - 2 * cross)


def square_root(matrix: np.ndarray) -> np.ndarray:
    """The square root of a symmetric positive semi-definite matrix."""
    values, vectors = np.linalg.eigh(matrix)
    return (vectors * np.sqrt(np.clip(values, 0, None))) @ vectors.T


def frechet_estimate(features: np.ndarray, reference: Moments, groups: np.ndarray) -> Estimate:
    """The distance of features from a fixed reference, with an interval for its expected value at this sample size."""
    if len(features) <= features.shape[1]:
        value = distance_of_few(features, reference)
        return jackknife(value, lambda g: distance_of_few(features[groups != g], reference), groups, low=0.0)
    shift = features.mean(0, dtype=np.float64)
    whole = Sums.of(features, shift)

    def without(group: int) -> float:
        left = whole - Sums.of(features[groups == group], shift)
        return frechet_distance(left.moments(shift), reference)

    return jackknife(frechet_distance(whole.moments(shift), reference), without, groups, low=0.0)


def finite_bias(reference: Moments, count: int, seed: int = 0) -> float:
    """The distance between the reference and `count` samples of its own Gaussian; it would be 0 for infinitely many."""
    size = len(reference.mean)
    features = np.random.default_rng(seed).standard_normal((count, size)) @ reference.root + reference.mean
    few = count <= size
    return distance_of_few(features, reference) if few else frechet_distance(moments(features), reference)
