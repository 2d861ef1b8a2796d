"""What goes into the stream: patches and their positions, the time, the picture's size, the caption.

Letters in shape comments: B batch, N = h·w image tokens, L caption tokens, D width, C channels.
"""

import math

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from pixart.model.layers import Mlp

FREQUENCIES = 256  # width of every sinusoidal embedding of a number


def sinusoid(values: Tensor) -> Tensor:
    """Numbers (B,) → (B, 256): 128 cosines, then 128 sines, of frequencies 10,000^(-i/128).

    Stays in fp32: in bf16 the time 951 becomes 952, a relative error of the network's output of 10 %.
    """
    half = FREQUENCIES // 2
    frequencies = torch.exp(-math.log(10_000) * torch.arange(half, dtype=torch.float32, device=values.device) / half)
    angles = values.float()[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def grid_positions(height: int, width: int, dim: int, *, base: int, scale: float, device=None) -> Tensor:
    """Fixed 2-D sin-cos positions of a grid of height × width tokens → fp32 (height·width, dim).

    A coordinate is index / (side / base) / scale, where `base` is the model's native number of tokens a side: so a
    picture of any size covers the same range (PixArt-α, section 2.4). The first half of `dim` encodes the column, the
    second the row; each is sines, then cosines, of frequencies 10,000^(-i / (dim/4)).
    """
    # float64 because the released weights were trained with it. MPS has none; fp32 errs by 4e-6 there.
    exact = torch.float32 if torch.device(device or "cpu").type == "mps" else torch.float64
    omega = 10_000 ** (-torch.arange(dim // 4, dtype=exact, device=device) / (dim / 4))

    def axis(count: int) -> Tensor:  # (count, dim/2)
        coordinate = (torch.arange(count, dtype=exact, device=device) / (count / base) / scale).float().to(exact)
        angles = coordinate[:, None] * omega
        return torch.cat([angles.sin(), angles.cos()], dim=-1).float()

    columns = axis(width)[None, :].expand(height, width, dim // 2)
    rows = axis(height)[:, None].expand(height, width, dim // 2)
    return torch.cat([columns, rows], dim=-1).flatten(0, 1)


class PatchEmbed(nn.Module):
    """Latents (B, C, H, W) → tokens (B, N, D), one per patch, row by row."""

    def __init__(self, channels: int, dim: int, patch_size: int):
        super().__init__()
        self.proj = nn.Conv2d(channels, dim, kernel_size=patch_size, stride=patch_size)

    def forward(self, x: Tensor) -> Tensor:
        # the convolution as the product that it is: a GPU would do it in TF32, and its output would lie transposed
        p, q = self.proj.kernel_size
        patches = rearrange(x, "b c (h p) (w q) -> b (h w) (c p q)", p=p, q=q)
        return F.linear(patches, self.proj.weight.flatten(1), self.proj.bias)


class NumberEmbedder(nn.Module):
    """Sinusoid and a two-layer MLP; (B,) → (B, dim)."""

    def __init__(self, dim: int):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(FREQUENCIES, dim), nn.SiLU(), nn.Linear(dim, dim))

    def forward(self, values: Tensor) -> Tensor:
        return self.mlp(sinusoid(values).to(self.mlp[0].weight.dtype))


class CaptionEmbedder(nn.Module):
    """Text states (B, L, caption_channels) → (B, L, D).

    `y_embedding` (caption_length, caption_channels) is the null caption of classifier-free guidance: never trained.
    """

    def __init__(self, caption_channels: int, dim: int, caption_length: int):
        super().__init__()
        self.y_proj = Mlp(caption_channels, dim, dim)
        self.register_buffer("y_embedding", torch.empty(caption_length, caption_channels))

    def forward(self, caption: Tensor) -> Tensor:
        return self.y_proj(caption)
