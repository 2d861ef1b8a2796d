"""Means, paired differences and their intervals over seeds."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pixart.evaluate.interval import Estimate, student, student_inside

POWER = 0.8  # the usual probability with which a difference is to be found


@dataclass(frozen=True)
class Difference:
    """An arm's mean difference to the baseline over the seeds that both have."""

    mean: float
    low: float | None  # its interval; None with fewer than two seeds
    high: float | None
    p: float | None  # two-sided, of Student's paired test
    # the smallest true difference that as many seeds of this spread find with probability `POWER`
    detectable: float | None
    seeds: tuple[int, ...]

    @property
    def clear(self) -> bool:
        """Whether the interval excludes zero."""
        return self.low is not None and self.high is not None and not self.low <= 0 <= self.high


def mean_over_seeds(values: Sequence[float], confidence: float | None) -> Estimate:
    """The mean with Student's interval; without one for fewer than two values."""
    mean = math.fsum(values) / len(values) if values else math.nan
    if confidence is None or len(values) < 2:
        return Estimate(mean)
    error = _deviation(values, mean) / math.sqrt(len(values))
    return Estimate.around(mean, error, len(values) - 1, confidence=confidence)


def paired_difference(
    arm: Mapping[int, float], baseline: Mapping[int, float], confidence: float | None
) -> Difference | None:
    """The mean of the differences arm − baseline of the seeds (keys) that both have; None if there is none.

    Runs of one seed see the same samples, times and noise in the same order, which makes them pairs: what they share
    drops out of the difference. The smallest difference found with probability `POWER` is (t at the interval's level +
    the quantile of t at `POWER`) · s / √n, which approximates the noncentral t by a shifted one.
    """
    seeds = tuple(seed for seed in baseline if seed in arm)
    if not seeds:
        return None
    values = [arm[seed] - baseline[seed] for seed in seeds]
    freedom = len(values) - 1
    estimate = mean_over_seeds(values, confidence)
    if estimate.low is None or confidence is None:
        return Difference(estimate.value, None, None, None, None, seeds)
    error = _deviation(values, estimate.value) / math.sqrt(len(values))
    if error == 0:
        p = 1.0 if estimate.value == 0 else 0.0
    else:
        p = 1 - student_inside(abs(estimate.value) / error, freedom)
    detectable = (student(freedom, confidence) + student(freedom, 2 * POWER - 1)) * error
    return Difference(estimate.value, estimate.low, estimate.high, p, detectable, seeds)


def holm(values: Sequence[float]) -> list[float]:
    """p values corrected for their number, in the same order (Holm 1979): the probability of one false finding or more
    among all of them stays below the level."""
    order = sorted(range(len(values)), key=values.__getitem__)
    corrected, least = [0.0] * len(values), 0.0
    for place, index in enumerate(order):
        least = max(least, min(1.0, (len(values) - place) * values[index]))
        corrected[index] = least
    return corrected


def _deviation(values: Sequence[float], mean: float) -> float:
    """The standard deviation of a sample."""
    if max(values) == min(values):  # where rounding of the mean would leave a trace
        return 0.0
    return math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1))
