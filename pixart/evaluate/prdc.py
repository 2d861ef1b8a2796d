"""Precision (how much of what is drawn looks real) and recall (how much of what is real is drawn), by neighbours.

Improved precision and recall (Kynkäänniemi et al. 2019; k = 3), density and coverage (Naeem et al. 2020; k = 5).
"""

from collections.abc import Iterator

import numpy as np

from pixart.evaluate.interval import Estimate, jackknife, mean_estimate

ROWS = 512  # rows of the distance matrix computed at a time
NEAREST, NEAREST_DENSITY = 3, 5


def distances(x: np.ndarray, y: np.ndarray) -> Iterator[tuple[slice, np.ndarray]]:
    """Squared distances of some rows of x to all rows of y at a time: (slice of x, (rows, N))."""
    x, y = x.astype(np.float64), y.astype(np.float64)
    lengths = (y * y).sum(1)
    for start in range(0, len(x), ROWS):
        part = slice(start, min(start + ROWS, len(x)))
        yield part, np.maximum((x[part] ** 2).sum(1)[:, None] + lengths - 2 * x[part] @ y.T, 0)


def radii(x: np.ndarray, nearest: int, groups: np.ndarray | None = None) -> np.ndarray:
    """Squared distance of each point to its `nearest`-th neighbour: (1 + number of groups, N).

    Row 0 considers all points, row 1 + g those outside group g.
    """
    count = 0 if groups is None else int(groups.max()) + 1
    found = np.empty((1 + count, len(x)))
    for part, squared in distances(x, x):
        squared[np.arange(len(squared)), np.arange(part.start, part.stop)] = np.inf  # a point is not its own neighbour
        found[0, part] = _smallest(squared, nearest)
        for group in range(count):
            found[1 + group, part] = _smallest(squared[:, groups != group], nearest)
    return found


def _smallest(squared: np.ndarray, nearest: int) -> np.ndarray:
    """The `nearest`-th smallest value of each row; infinite if there are fewer."""
    if squared.shape[1] < nearest:
        return np.full(len(squared), np.inf)
    return np.partition(squared, nearest - 1, axis=1)[:, nearest - 1]


def prdc(features: np.ndarray, reference: np.ndarray, groups: np.ndarray) -> dict[str, Estimate]:
    """Precision, recall, density and coverage of features, with intervals for a fixed reference."""
    near, dense = radii(reference, NEAREST)[0], radii(reference, NEAREST_DENSITY)[0]
    own = radii(features, NEAREST, groups)
    count = len(own) - 1
    precise, density = np.zeros(len(features)), np.zeros(len(features))
    recalled = np.zeros((1 + count, len(reference)), dtype=bool)
    covered = np.zeros_like(recalled)
    for part, squared in distances(features, reference):
        precise[part] = (squared <= near).any(1)
        density[part] = (squared <= dense).sum(1) / NEAREST_DENSITY
        for row in range(1 + count):
            kept = groups[part] != row - 1
            recalled[row] |= (squared[kept] <= own[row, part][kept, None]).any(0)
            covered[row] |= (squared[kept] <= dense).any(0)

    def share(hits: np.ndarray) -> Estimate:
        rates = hits.mean(1)
        return jackknife(float(rates[0]), lambda group: float(rates[1 + group]), groups, low=0.0, high=1.0)

    return {
        "precision": mean_estimate(precise, groups, low=0.0, high=1.0),
        "recall": share(recalled),
        "density": mean_estimate(density, groups, low=0.0),
        "coverage": share(covered),
    }
