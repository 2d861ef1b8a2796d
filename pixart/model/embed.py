"""Embeddings of the network's inputs: patches and their positions, the time, the image's size, the caption.

Letters in shape comments: B batch, N = h·w image tokens, L caption tokens, D width, C channels.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from pixart.model.layers import Generators, Mlp
from pixart.registry import Registry

if TYPE_CHECKING:
    from pixart.model.pixart import PixArtConfig

# each entry: a subclass of `Positions`
POSITIONS: Registry[type[Positions]] = Registry("model.positions")

FREQUENCIES = 256  # width of every sinusoidal embedding of a number


def sinusoid(values: Tensor) -> Tensor:
    """Sinusoidal embedding of numbers (B,) → fp32 (B, 256): 128 cosines, then 128 sines, frequencies 10,000^(-i/128).

    Always fp32: bf16 rounds the time 951 to 952, which changes the network's output by 10 %.
    """
    half = FREQUENCIES // 2
    frequencies = torch.exp(-math.log(10_000) * torch.arange(half, dtype=torch.float32, device=values.device) / half)
    angles = values.float()[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def grid_positions(height: int, width: int, dim: int, *, base: int, scale: float, device=None) -> Tensor:
    """Fixed 2-D sin-cos positions of a grid of height × width tokens → fp32 (height·width, dim).

    A coordinate is index / (side / base) / scale, where `base` is the model's native number of tokens per side, so that
    images of all sizes cover the same range (PixArt-α, section 2.4). The first half of `dim` encodes the column, the
    second the row; each holds sines, then cosines, of frequencies 10,000^(-i / (dim/4)).
    """
    # float64, as in the training of the released weights; MPS has no float64, and fp32 differs by 4e-6
    exact = torch.float32 if torch.device(device or "cpu").type == "mps" else torch.float64
    omega = 10_000 ** (-torch.arange(dim // 4, dtype=exact, device=device) / (dim / 4))

    def axis(count: int) -> Tensor:  # (count, dim/2)
        coordinate = (torch.arange(count, dtype=exact, device=device) / (count / base) / scale).float().to(exact)
        angles = coordinate[:, None] * omega
        return torch.cat([angles.sin(), angles.cos()], dim=-1).float()

    columns = axis(width)[None, :].expand(height, width, dim // 2)
    rows = axis(height)[:, None].expand(height, width, dim // 2)
    return torch.cat([columns, rows], dim=-1).flatten(0, 1)


class Positions(nn.Module):
    """Base class of positional encodings: override `added`, `rotary` or both. It may have weights."""

    def __init__(self, config: PixArtConfig):
        super().__init__()
        self.config = config

    def added(self, height: int, width: int, device: torch.device | None = None) -> Tensor | None:
        """Positions added to the tokens of a grid of height × width: (height·width, D), or None."""
        return None

    def rotary(self, height: int, width: int, device: torch.device | None = None) -> Tensor | None:
        """Rotary positions for `rotate`: cosines and sines (2, height·width, E/2), or None."""
        return None


@POSITIONS.register("sincos")
class SinCos(Positions):
    """The fixed 2-D sin-cos positions of `grid_positions`, added in fp32."""

    def added(self, height: int, width: int, device: torch.device | None = None) -> Tensor:
        c = self.config
        base = c.latent_size // c.patch_size
        return grid_positions(height, width, c.hidden_size, base=base, scale=c.position_scale, device=device)


class PatchProjection(nn.Conv2d):
    """A convolution whose patches do not overlap: (B, C, H, W) → (B, N, D), row by row.

    It is a matrix product: cuDNN's convolution would use TF32 by default and return a transposed layout.
    """

    def patches(self, x: Tensor) -> Tensor:
        """(B, C, H, W) → (B, N, C·p·p)."""
        p, q = self.kernel_size
        return rearrange(x, "b c (h p) (w q) -> b (h w) (c p q)", p=p, q=q)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.patches(x), self.weight.flatten(1), self.bias)


class PatchEmbed(nn.Module):
    """Latents (B, C, H, W) → tokens (B, N, D), one per patch, row by row."""

    def __init__(self, channels: int, dim: int, patch_size: int):
        super().__init__()
        self.proj = PatchProjection(channels, dim, kernel_size=patch_size, stride=patch_size)

    def init_weights(self, generators: Generators) -> None:
        patches = self.proj.weight.flatten(1)  # (D, C·p·p)
        nn.init.xavier_uniform_(patches, generator=generators("proj.weight"))
        bound = patches.shape[1] ** -0.5  # PyTorch's default for a convolution's bias
        nn.init.uniform_(self.proj.bias, -bound, bound, generator=generators("proj.bias"))

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x)


class NumberEmbedder(nn.Module):
    """Sinusoidal embedding and a two-layer MLP; (B,) → (B, dim)."""

    def __init__(self, dim: int):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(FREQUENCIES, dim), nn.SiLU(), nn.Linear(dim, dim))

    def init_weights(self, generators: Generators) -> None:
        for i in (0, 2):
            nn.init.normal_(self.mlp[i].weight, std=0.02, generator=generators(f"mlp.{i}.weight"))

    def forward(self, values: Tensor) -> Tensor:
        return self.mlp(sinusoid(values).to(self.mlp[0].weight.dtype))


class CaptionEmbedder(nn.Module):
    """Text states (B, L, caption_channels) → (B, L, D).

    `y_embedding` (caption_length, caption_channels) is the null caption of classifier-free guidance; it is not trained.
    """

    def __init__(self, caption_channels: int, dim: int, caption_length: int):
        super().__init__()
        self.y_proj = Mlp(caption_channels, dim, dim)
        self.register_buffer("y_embedding", torch.empty(caption_length, caption_channels))

    def init_weights(self, generators: Generators) -> None:
        for layer in ("fc1", "fc2"):
            weight = self.y_proj.get_submodule(layer).weight
            nn.init.normal_(weight, std=0.02, generator=generators(f"y_proj.{layer}.weight"))
        std = self.y_embedding.shape[1] ** -0.5
        nn.init.normal_(self.y_embedding, std=std, generator=generators("y_embedding"))

    def forward(self, caption: Tensor) -> Tensor:
        return self.y_proj(caption)
