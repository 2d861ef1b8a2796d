"""Kernel Inception distance: the unbiased squared MMD with the kernel (x·y / D + 1)³ (Bińkowski et al. 2018)."""

import numpy as np

from pixart.evaluate.interval import Estimate, jackknife

ROWS = 1024  # rows of the kernel matrix computed at a time


def kernel_sums(x: np.ndarray, y: np.ndarray, groups_x: np.ndarray, groups_y: np.ndarray) -> np.ndarray:
    """Sums of the kernel over all pairs of each pair of groups: (groups of x, groups of y)."""
    sums = np.zeros((groups_x.max() + 1, groups_y.max() + 1))
    y64, members = y.astype(np.float64), np.eye(groups_y.max() + 1)[groups_y]
    for start in range(0, len(x), ROWS):
        part = slice(start, start + ROWS)
        kernel = (x[part].astype(np.float64) @ y64.T / x.shape[1] + 1) ** 3
        np.add.at(sums, groups_x[part], kernel @ members)
    return sums


def kid_estimate(features: np.ndarray, reference: np.ndarray, groups: np.ndarray) -> Estimate:
    """The MMD² between features and reference, with its interval; unbiased, so it may be negative."""
    none = np.zeros(len(reference), dtype=np.int64)
    diagonal = ((features.astype(np.float64) ** 2).sum(1) / features.shape[1] + 1) ** 3
    own = np.bincount(groups, diagonal)  # pairs of an image with itself are excluded
    counts = np.bincount(groups).astype(np.float64)
    xx = kernel_sums(features, features, groups, groups)
    xy = kernel_sums(features, reference, groups, none)[:, 0]
    m = len(reference)
    itself = (((reference.astype(np.float64) ** 2).sum(1) / reference.shape[1] + 1) ** 3).sum()
    yy = (kernel_sums(reference, reference, none, none)[0, 0] - itself) / (m * (m - 1))

    def value(kept: np.ndarray) -> float:
        n = counts[kept].sum()
        inside = (xx[np.ix_(kept, kept)].sum() - own[kept].sum()) / (n * (n - 1))
        return float(inside + yy - 2 * xy[kept].sum() / (n * m))

    every = np.arange(len(counts))
    return jackknife(value(every), lambda group: value(np.delete(every, group)), groups)
