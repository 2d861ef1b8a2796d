"""KV compression without weights (PixArt-Σ, section 3.2 and appendix): which keys and values of a grid are kept.

Each function takes tokens (B, N, D) in row-major order, their grid (rows, columns) and the ratio R, and returns the
kept tokens (B, M, D). The fourth kind, "conv", has weights and is part of `SelfAttention`.
"""

from collections.abc import Callable

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor


def average(tokens: Tensor, grid: tuple[int, int], ratio: int) -> Tensor:
    """The mean of every R × R square: M = N / R². The paper calls it token pooling.

    The authors' code selects the nearest token under this name, which is `uniform` here.
    """
    image = rearrange(tokens, "b (h w) d -> b d h w", h=grid[0], w=grid[1])
    return rearrange(F.avg_pool2d(image, ratio), "b d h w -> b (h w) d")


def uniform(tokens: Tensor, grid: tuple[int, int], ratio: int) -> Tensor:
    """The first token of every R × R square: M = N / R²."""
    image = rearrange(tokens, "b (h w) d -> b h w d", h=grid[0], w=grid[1])
    return rearrange(image[:, ::ratio, ::ratio], "b h w d -> b (h w) d")


def uniform_every(tokens: Tensor, grid: tuple[int, int], ratio: int) -> Tensor:
    """Every R-th token of the row-major sequence: M = N / R."""
    return tokens[:, ::ratio]


SELECTIONS: dict[str, Callable[[Tensor, tuple[int, int], int], Tensor]] = {
    "ave": average,
    "uniform": uniform,
    "uniform_every": uniform_every,
}
