"""The layers of a PixArt block (PixArt-α, section 2.3; KV compression: PixArt-Σ, section 3.2).

Letters in shape comments:
    B batch, N image tokens (h·w), M compressed image tokens, L caption tokens, D width, H heads, E width of a head
"""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

CaptionKV = tuple[Tensor, Tensor]  # one block's caption keys and values, each (B, H, L, E)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """adaLN: scale and shift a normalised stream; x (B, N, D), shift and scale (B, 1, D)."""
    return torch.addcmul(shift, x, 1 + scale)


class Mlp(nn.Module):
    """Two linear layers around a tanh-form GELU; (…, in_features) → (…, out_features)."""

    def __init__(self, in_features: int, hidden_features: int, out_features: int):
        super().__init__()
        self.fc1 = nn.Linear(in_features, hidden_features)
        self.act = nn.GELU(approximate="tanh")
        self.fc2 = nn.Linear(hidden_features, out_features)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


class SelfAttention(nn.Module):
    """Attention among the image tokens.

    With `compression`, keys and values are taken on a grid `ratio` times coarser (PixArt-Σ, equation 2):
    "conv" by one strided depthwise convolution and LayerNorm shared by both, "uniform" by picking every
    ratio-th token. With `qk_norm`, queries and keys pass a LayerNorm over the full width, keys before compression.
    """

    def __init__(self, dim: int, num_heads: int, *, compression: str | None = None, ratio: int = 1, qk_norm=False):
        super().__init__()
        self.num_heads = num_heads
        self.compression = compression
        self.ratio = ratio
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        if compression == "conv":
            self.sr = nn.Conv2d(dim, dim, kernel_size=ratio, stride=ratio, groups=dim)
            self.norm = nn.LayerNorm(dim)
        self.q_norm = nn.LayerNorm(dim) if qk_norm else nn.Identity()
        self.k_norm = nn.LayerNorm(dim) if qk_norm else nn.Identity()

    def compress(self, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        if self.compression is None:
            return tokens
        image = rearrange(tokens, "b (h w) d -> b d h w", h=grid[0], w=grid[1])
        if self.compression == "uniform":
            return rearrange(image[:, :, :: self.ratio, :: self.ratio], "b d h w -> b (h w) d")
        return self.norm(rearrange(self.sr(image), "b d h w -> b (h w) d"))  # (B, M, D)

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        # fmt: off
        q, k, v = self.qkv(x).chunk(3, dim=-1)                     # 3 × (B, N, D)
        q, k = self.q_norm(q), self.k_norm(k)
        k, v = self.compress(k, grid), self.compress(v, grid)      # (B, M, D)
        q, k, v = (rearrange(z, "b n (h e) -> b h n e", h=self.num_heads) for z in (q, k, v))
        x = F.scaled_dot_product_attention(q, k, v)                # (B, H, N, E)
        return self.proj(rearrange(x, "b h n e -> b n (h e)"))     # (B, N, D)
        # fmt: on


class CrossAttention(nn.Module):
    """Image tokens attend to the unmasked caption tokens."""

    def __init__(self, dim: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.q_linear = nn.Linear(dim, dim)
        self.kv_linear = nn.Linear(dim, 2 * dim)
        self.proj = nn.Linear(dim, dim)

    def encode(self, caption: Tensor) -> CaptionKV:
        """Projected caption (B, L, D) → its keys and values, which no time step changes."""
        k, v = rearrange(self.kv_linear(caption), "b l (two h e) -> two b h l e", two=2, h=self.num_heads)
        return k, v

    def forward(self, x: Tensor, kv: CaptionKV, mask: Tensor | None) -> Tensor:
        """x (B, N, D), mask (B, 1, 1, L) with True = keep → (B, N, D)."""
        # fmt: off
        q = rearrange(self.q_linear(x), "b n (h e) -> b h n e", h=self.num_heads)  # (B, H, N, E)
        x = F.scaled_dot_product_attention(q, *kv, attn_mask=mask)                 # (B, H, N, E)
        return self.proj(rearrange(x, "b h n e -> b n (h e)"))                     # (B, N, D)
        # fmt: on


class Block(nn.Module):
    """Self-attention, cross-attention and MLP; adaLN-single conditions the first and the last (figure 4)."""

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float, **attention):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.attn = SelfAttention(dim, num_heads, **attention)
        self.cross_attn = CrossAttention(dim, num_heads)
        self.norm2 = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), dim)
        self.scale_shift_table = nn.Parameter(torch.empty(6, dim))

    def forward(
        self, x: Tensor, time6: Tensor, caption: Tensor | CaptionKV, mask: Tensor | None, grid: tuple[int, int]
    ) -> Tensor:
        """x (B, N, D), time6 (B, 6, D), caption (B, L, D) or its keys and values → (B, N, D)."""
        kv = self.cross_attn.encode(caption) if isinstance(caption, Tensor) else caption
        rows = self.scale_shift_table + time6  # (B, 6, D)
        shift1, scale1, gate1, shift2, scale2, gate2 = rows.chunk(6, dim=1)  # (B, 1, D) each
        x = torch.addcmul(x, gate1, self.attn(modulate(self.norm1(x), shift1, scale1), grid))
        x = x + self.cross_attn(x, kv, mask)
        return torch.addcmul(x, gate2, self.mlp(modulate(self.norm2(x), shift2, scale2)))


class FinalLayer(nn.Module):
    """Modulated LayerNorm and a linear map to pixels of a patch; (B, N, D) → (B, N, patch²·C)."""

    def __init__(self, dim: int, patch_values: int):
        super().__init__()
        self.norm_final = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.linear = nn.Linear(dim, patch_values)
        self.scale_shift_table = nn.Parameter(torch.empty(2, dim))

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        # `time` is the embedding itself here, not what t_block makes of it
        shift, scale = (self.scale_shift_table + time[:, None]).chunk(2, dim=1)  # (B, 1, D)
        return self.linear(modulate(self.norm_final(x), shift, scale))
