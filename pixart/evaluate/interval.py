"""Intervals for the expected value of a score at a given number of images, by a jackknife over groups.

A percentile bootstrap would be biased: its resamples contain images twice and are therefore less varied, which
increases a Fréchet distance. Leaving out groups shifts all replicates by nearly the same bias; only the spread is used.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

GROUPS = 20  # number of groups; the images of one prompt are in one group
Z = 1.959964  # two-sided 95 %


@dataclass(frozen=True)
class Estimate:
    """A number with its interval (95 % unless said otherwise), which is None if there are too few images."""

    value: float
    low: float | None = None
    high: float | None = None

    def percent(self) -> str:
        """A rate as a text: 93.5 % (±3.1)."""
        half = f" (±{50 * (self.high - self.low):.1f})" if self.low is not None and self.high is not None else ""
        return f"{100 * self.value:.1f} %{half}"

    @classmethod
    def around(
        cls,
        value: float,
        error: float,
        freedom: int,
        low: float = -math.inf,
        high: float = math.inf,
        *,
        confidence: float = 0.95,
    ):
        """`value` ± Student's quantile times `error`, clipped to the range of the number, `low` to `high`."""
        half = student(freedom, confidence) * error
        return cls(value, max(value - half, low), min(value + half, high))


def student_inside(t: float, freedom: int) -> float:
    """The probability that |T| < t for Student's T with a whole number of degrees of freedom (Abramowitz and Stegun
    26.7.3 and 26.7.4)."""
    angle = math.atan(t / math.sqrt(freedom))
    sine, square = math.sin(angle), math.cos(angle) ** 2
    term, total = (1.0 if freedom % 2 == 0 else math.cos(angle)), 0.0
    for k in range(1 + freedom % 2, freedom, 2):
        total += term
        term *= square * k / (k + 1)
    return sine * total if freedom % 2 == 0 else 2 / math.pi * (angle + sine * total)


def student(freedom: int, inside: float = 0.95) -> float:
    """The t for which |T| < t with the probability `inside`: by default the 97.5 % quantile of Student's T."""
    low, high = 0.0, 1.0
    while student_inside(high, freedom) < inside:
        high *= 2
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if student_inside(middle, freedom) < inside else (low, middle)
    return high


def assign_groups(clusters: Sequence[int], groups: int = GROUPS) -> np.ndarray:
    """The group of every image: all images of a cluster (prompt) in one group, groups of about equal size."""
    numbers = {cluster: i for i, cluster in enumerate(dict.fromkeys(clusters))}
    count = min(groups, len(numbers))
    return np.array([numbers[cluster] % count for cluster in clusters], dtype=np.int64)


def jackknife(
    value: float, without: Callable[[int], float], groups: np.ndarray, *, low: float = -math.inf, high: float = math.inf
) -> Estimate:
    """An interval from `without(g)`, the value without the images of group g (Efron and Stein 1981).

    Args:
        low, high: the range of the number.
    """
    count = int(groups.max()) + 1 if len(groups) else 0
    if count < 5:
        return Estimate(value)
    left = np.array([without(group) for group in range(count)])
    error = math.sqrt((count - 1) / count * float(((left - left.mean()) ** 2).sum()))
    return Estimate.around(value, error, count - 1, low, high)


def mean_estimate(values: np.ndarray, groups: np.ndarray, *, low: float = -math.inf, high: float = math.inf):
    """The mean of one number per image, with its jackknife interval."""
    values = np.asarray(values, dtype=np.float64)
    total, size = values.sum(), len(values)
    sums, counts = np.bincount(groups, values), np.bincount(groups)
    return jackknife(total / size, lambda g: (total - sums[g]) / (size - counts[g]), groups, low=low, high=high)


def rate_estimate(hits: np.ndarray, clusters: Sequence[int]) -> Estimate:
    """The share of hits with Wilson's interval (1927), which is valid near 0 and 1 as well.

    Images of one cluster (prompt) may be right or wrong together. If there are several of some, the interval is that of
    as many independent images as would vary as much, with Student's quantile for the number of clusters (Korn and
    Graubard 1998). If all are of one cluster, they are independent draws of it.

    Args:
        hits: of every image, (N,), boolean.
        clusters: of every image.
    """
    count, (_, of, sizes) = len(hits), np.unique(clusters, return_inverse=True, return_counts=True)
    if not count:
        return Estimate(math.nan)
    rate, z, many = float(np.mean(hits)), Z, len(sizes)
    if 1 < many < count:
        fewest = count**2 / float((sizes**2).sum())  # if each cluster is right or wrong as a whole
        z = student(many - 1)
        variance = many / (many - 1) * float(((np.bincount(of, hits) - rate * sizes) ** 2).sum()) / count**2
        if not 0 < rate < 1:  # no cluster says how much its images vary
            count = fewest
        elif variance > 0:
            count = min(max(rate * (1 - rate) / variance, fewest), count)
    middle = (rate + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * math.sqrt(rate * (1 - rate) / count + z * z / (4 * count**2))
    return Estimate(rate, max(middle - half, 0.0), min(middle + half, 1.0))
