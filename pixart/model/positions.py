"""Positions besides the fixed sin-cos table: `model.positions: learned` or `rope2d`.

Letters in shape comments: N = h·w image tokens, D width, E width of a head.
"""

import math

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from pixart.errors import InputError
from pixart.model.embed import POSITIONS, Positions
from pixart.model.layers import Generators

ROPE_BASE = 100.0


@POSITIONS.register("learned")
class Learned(Positions):
    """A trained table of the native grid (ViT, arXiv 2010.11929, section 3.1); a grid of another size gets it by
    bicubic interpolation (section 3.2)."""

    def __init__(self, config):
        super().__init__(config)
        self.side = config.latent_size // config.patch_size
        self.table = nn.Parameter(torch.empty(self.side**2, config.hidden_size))  # row by row

    def init_weights(self, generators: Generators) -> None:
        nn.init.normal_(self.table, std=0.02, generator=generators("table"))

    def added(self, height: int, width: int, device: torch.device | None = None) -> Tensor:
        return self.table if (height, width) == (self.side, self.side) else resize(self.table, height, width)


def resize(table: Tensor, height: int, width: int) -> Tensor:
    """The table of a square grid (N, D), interpolated to height × width tokens: (height·width, D)."""
    image = rearrange(table, "(h w) d -> 1 d h w", h=math.isqrt(len(table)))
    return rearrange(F.interpolate(image, (height, width), mode="bicubic"), "1 d h w -> (h w) d")


@POSITIONS.register("rope2d")
class Rope2d(Positions):
    """2-D rotary positions (RoFormer, arXiv 2104.09864; axial, as in arXiv 2403.13298, section 3.2).

    Half of a head's pairs turn with the row, half with the column, by frequencies 100^(-i / (E/4)). A coordinate is
    that of the sin-cos table, index / (side / base) / scale: an image of any size covers the same range.
    """

    def __init__(self, config):
        super().__init__(config)
        if config.hidden_size // config.num_heads % 4:
            raise InputError(
                f"model.positions rope2d: a head has width {config.hidden_size // config.num_heads}, expected a "
                "multiple of 4; choose another num_heads"
            )

    def rotary(self, height: int, width: int, device: torch.device | None = None) -> Tensor:
        c = self.config
        quarter = c.hidden_size // c.num_heads // 4
        omega = ROPE_BASE ** (-torch.arange(quarter, dtype=torch.float32, device=device) / quarter)
        base = c.latent_size // c.patch_size

        def axis(count: int) -> Tensor:  # (count, E/4)
            index = torch.arange(count, dtype=torch.float32, device=device)
            return (index / (count / base) / c.position_scale)[:, None] * omega

        rows = axis(height)[:, None].expand(height, width, quarter)
        columns = axis(width)[None, :].expand(height, width, quarter)
        angles = torch.cat([rows, columns], dim=-1).flatten(0, 1)  # (N, E/2)
        return torch.stack([angles.cos(), angles.sin()])
