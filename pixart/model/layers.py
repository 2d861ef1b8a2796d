"""The layers of a PixArt block (PixArt-α, section 2.3; KV compression: PixArt-Σ, section 3.2), and the registries from
which norm, MLP, self-attention, conditioning and token routing are chosen by name. Their alternatives are in the
modules beside this one.

Letters in shape comments:
    B batch, N image tokens (h·w), M compressed or routed tokens, L caption tokens, D width, H heads, E head width
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from pixart.errors import InputError
from pixart.model.compression import SELECTIONS
from pixart.registry import Registry
from pixart.seeds import Draw

if TYPE_CHECKING:
    from pixart.model.pixart import PixArtConfig

CaptionKV = tuple[Tensor, Tensor]  # one block's caption keys and values, each (B, H, L, E)
Generators = Callable[[str], torch.Generator]  # name of one of a module's tensors → the generator for it

# each entry: entry(width) → a norm without weights, over the last dimension
NORMS: Registry[Callable[[int], nn.Module]] = Registry("model.norm")
# each entry: a class made as entry(in_features, hidden_features, out_features)
MLPS: Registry[Callable[[int, int, int], nn.Module]] = Registry("model.mlp")
# each entry: a class made as entry(config, index) and called as `SelfAttention` is
ATTENTION: Registry[Callable[..., nn.Module]] = Registry("model.attention")
CONDITIONING: Registry[Conditioning] = Registry("model.conditioning")
QK_NORMS: dict[bool | str, Callable[[int], nn.Module]] = {
    False: lambda _: nn.Identity(),
    True: nn.LayerNorm,
    "rms_norm": lambda dim: nn.RMSNorm(dim, eps=1e-6),
}
# each entry: a subclass of `Routing`
ROUTING: Registry[type[Routing]] = Registry("model.routing")


class Layout(NamedTuple):
    """The positions of the tokens that a block receives."""

    grid: tuple[int, int] | None  # rows and columns; None if the tokens are not exactly those of a full grid
    rotary: Tensor | None = None  # cosines and sines (2, N, E/2), or (2, B, 1, N, E/2) if they differ between images

    def take(self, index: Tensor) -> Layout:
        """The layout of the tokens `index` (B, M) of each image."""
        return Layout(None, None if self.rotary is None else self.rotary[:, index][:, :, None])


class Conditioning(NamedTuple):
    """How the time conditions the network: the classes of the blocks and the final layer, and the shared modules."""

    block: type[Block]
    final: type[FinalLayer]
    shared: Callable[[int], nn.Module] | None = (
        None  # width D → a module: time (B, D) → the input that all blocks share
    )
    tokens: Callable[[int], nn.Module] | None = None  # width D → a module: time (B, D) → extra tokens (B, n, D)
    # caption as a block gets it, mask (B, 1, 1, L) or None → (B, D), which is added to the time
    pool: Callable[[Tensor | CaptionKV, Tensor | None], Tensor] | None = None


class Routing:
    """Base class of token routing: some tokens skip blocks `first` to `last` (numbered from 0, inclusive) unchanged."""

    first: int
    last: int
    training_only: bool = False  # sampling routes nothing, so that a format without routing can hold the network
    # keyword arguments of the network's forward that `choose` reads; with a Draw, training draws them per sample
    conditions: Mapping[str, Draw | None] = {}

    def __init__(self, config: PixArtConfig):
        """A subclass sets `first` and `last` here."""

    def choose(self, tokens: int, conditions: Mapping[str, Tensor]) -> Tensor | None:
        """Indices (B, M) of the image tokens that pass through the blocks; None if all do, as in sampling."""
        return None


@NORMS.register("layer_norm")
def layer_norm(dim: int) -> nn.Module:
    """LayerNorm without weights, for adaLN."""
    return nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)


def take(x: Tensor, index: Tensor) -> Tensor:
    """The tokens `index` (B, M) of x (B, N, D) → (B, M, D)."""
    return x.gather(1, index[:, :, None].expand(-1, -1, x.shape[2]))


def put_back(x: Tensor, index: Tensor, whole: Tensor) -> Tensor:
    """`whole` (B, N, D) with its tokens `index` (B, M) replaced by `x` (B, M, D)."""
    return whole.scatter(1, index[:, :, None].expand(-1, -1, x.shape[2]), x.to(whole.dtype))


def with_extra(index: Tensor, count: int) -> Tensor:
    """Indices (B, M) of image tokens → indices into a sequence that begins with `count` extra tokens, all included."""
    if not count:
        return index
    extra = torch.arange(count, device=index.device).expand(len(index), count)
    return torch.cat([extra, index + count], dim=1)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """adaLN: scale and shift normalised tokens x (B, N, D) by `scale` and `shift` (B, 1, D)."""
    return torch.addcmul(shift, x, 1 + scale)


def rotate(x: Tensor, rotary: Tensor) -> Tensor:
    """Rotary positions (arXiv 2104.09864): rotate the pairs (i, i + E/2) of x (B, H, N, E) by angles `rotary`."""
    cos, sin = rotary.to(x.dtype)
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, first * sin + second * cos], dim=-1)


@MLPS.register("gelu")
class Mlp(nn.Module):
    """Two linear layers with a tanh-approximated GELU between them; (…, in_features) → (…, out_features)."""

    def __init__(self, in_features: int, hidden_features: int, out_features: int):
        super().__init__()
        self.fc1 = nn.Linear(in_features, hidden_features)
        self.act = nn.GELU(approximate="tanh")
        self.fc2 = nn.Linear(hidden_features, out_features)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


@ATTENTION.register("softmax")
class SelfAttention(nn.Module):
    """Self-attention among the image tokens.

    With `kv_compression`, keys and values are reduced to a grid coarser by `kv_ratio` per side (PixArt-Σ, equation 2):
    "conv" by a strided depthwise convolution and a LayerNorm, shared by keys and values; the other kinds, which have no
    weights, are in `compression`. With `qk_norm`, queries and keys pass through a norm over the full width, keys before
    compression.
    """

    def __init__(self, config: PixArtConfig, index: int):
        super().__init__()
        dim, ratio = config.hidden_size, config.kv_ratio
        self.num_heads, self.ratio = config.num_heads, ratio
        self.compression = config.kv_compression if index in config.kv_blocks else None
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        if self.compression == "conv":
            self.sr = nn.Conv2d(dim, dim, kernel_size=ratio, stride=ratio, groups=dim)
            self.norm = nn.LayerNorm(dim)
        self.q_norm, self.k_norm = QK_NORMS[config.qk_norm](dim), QK_NORMS[config.qk_norm](dim)

    def init_weights(self, _: Generators) -> None:
        if self.compression == "conv":  # average pooling
            nn.init.constant_(self.sr.weight, self.ratio**-2)
            nn.init.zeros_(self.sr.bias)

    def compress(self, tokens: Tensor, layout: Layout) -> Tensor:
        if self.compression is None:
            return tokens
        if layout.grid is None or layout.rotary is not None:
            raise InputError("kv_compression needs all tokens of the grid and no rotary positions; use other kv_blocks")
        if self.compression != "conv":
            return SELECTIONS[self.compression](tokens, layout.grid, self.ratio)
        image = rearrange(tokens, "b (h w) d -> b d h w", h=layout.grid[0], w=layout.grid[1])
        return self.norm(rearrange(self.sr(image), "b d h w -> b (h w) d"))  # (B, M, D)

    def forward(self, x: Tensor, layout: Layout) -> Tensor:
        # fmt: off
        q, k, v = self.qkv(x).chunk(3, dim=-1)                              # 3 × (B, N, D)
        q, k = self.q_norm(q), self.k_norm(k)
        k, v = self.compress(k, layout), self.compress(v, layout)           # (B, M, D)
        q, k, v = (rearrange(z, "b n (h e) -> b h n e", h=self.num_heads) for z in (q, k, v))
        if layout.rotary is not None:
            q, k = rotate(q, layout.rotary), rotate(k, layout.rotary)
        x = F.scaled_dot_product_attention(q, k, v)                         # (B, H, N, E)
        return self.proj(rearrange(x, "b h n e -> b n (h e)"))              # (B, N, D)
        # fmt: on


class CrossAttention(nn.Module):
    """Attention of the image tokens to the unmasked caption tokens."""

    def __init__(self, dim: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.q_linear = nn.Linear(dim, dim)
        self.kv_linear = nn.Linear(dim, 2 * dim)
        self.proj = nn.Linear(dim, dim)

    def init_weights(self, _: Generators) -> None:
        nn.init.zeros_(self.proj.weight)  # at initialisation captions have no effect

    def encode(self, caption: Tensor) -> CaptionKV:
        """Projected caption (B, L, D) → its keys and values, which do not depend on the time."""
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
    """Self-attention, cross-attention and MLP; adaLN-single modulates self-attention and MLP (PixArt-α, figure 4)."""

    def __init__(self, config: PixArtConfig, index: int):
        super().__init__()
        dim = config.hidden_size
        self.norm1 = NORMS[config.norm](dim)
        self.attn = ATTENTION[config.attention](config, index)
        self.cross_attn = CrossAttention(dim, config.num_heads)
        self.norm2 = NORMS[config.norm](dim)
        self.mlp = MLPS[config.mlp](dim, int(dim * config.mlp_ratio), dim)
        self.add_modulation(dim)

    def add_modulation(self, dim: int) -> None:
        """Create this block's own modulation parameters; another conditioning overrides this, `init_weights` and
        `modulation`."""
        self.scale_shift_table = nn.Parameter(torch.empty(6, dim))

    def init_weights(self, generators: Generators) -> None:
        _init_table(self.scale_shift_table, generators)

    def modulation(self, shared: Tensor) -> Tensor:
        """The shared conditioning, here t_block's output (B, 6·D) → (B, 6, D): shift, scale and gate of attention, then
        of the MLP."""
        return self.scale_shift_table + rearrange(shared, "b (six d) -> b six d", six=6)

    def forward(
        self, x: Tensor, shared: Tensor, caption: Tensor | CaptionKV, mask: Tensor | None, layout: Layout
    ) -> Tensor:
        """x (B, N, D), shared (B, 6·D), caption (B, L, D) or its keys and values, mask (B, 1, 1, L) → (B, N, D)."""
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(shared).chunk(6, dim=1)  # (B, 1, D) each
        x = torch.addcmul(x, gate1, self.attn(modulate(self.norm1(x), shift1, scale1), layout))
        x = self.read_caption(x, caption, mask)
        return torch.addcmul(x, gate2, self.mlp(modulate(self.norm2(x), shift2, scale2)))

    def encode_caption(self, caption: Tensor) -> CaptionKV:
        """What a projected caption (B, L, D) becomes for this block, the same at every time step."""
        return self.cross_attn.encode(caption)

    def read_caption(self, x: Tensor, caption: Tensor | CaptionKV, mask: Tensor | None) -> Tensor:
        """The stream (B, N, D) after cross-attention."""
        kv = self.encode_caption(caption) if isinstance(caption, Tensor) else caption
        return x + self.cross_attn(x, kv, mask)


class FinalLayer(nn.Module):
    """Modulated norm and a linear layer to the values of a patch; (B, N, D) → (B, N, patch²·C_out)."""

    def __init__(self, config: PixArtConfig):
        super().__init__()
        dim = config.hidden_size
        self.norm_final = NORMS[config.norm](dim)
        self.linear = nn.Linear(dim, config.patch_size**2 * config.out_channels)
        self.add_modulation(dim)

    def add_modulation(self, dim: int) -> None:
        self.scale_shift_table = nn.Parameter(torch.empty(2, dim))

    def init_weights(self, generators: Generators) -> None:
        nn.init.zeros_(self.linear.weight)
        _init_table(self.scale_shift_table, generators)

    def modulation(self, time: Tensor) -> Tensor:
        """The time embedding (B, D), not t_block's output → shift and scale (B, 2, D)."""
        return self.scale_shift_table + time[:, None]

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        shift, scale = self.modulation(time).chunk(2, dim=1)  # (B, 1, D)
        return self.linear(modulate(self.norm_final(x), shift, scale))


class TimeBlock(nn.Sequential):
    """The projection of the time embedding that adaLN-single shares among all blocks: (B, D) → (B, 6·D)."""

    def __init__(self, dim: int):
        super().__init__(nn.SiLU(), nn.Linear(dim, 6 * dim))

    def init_weights(self, generators: Generators) -> None:
        nn.init.normal_(self[1].weight, std=0.02, generator=generators("1.weight"))


CONDITIONING.register("adaln_single")(Conditioning(Block, FinalLayer, shared=TimeBlock))


def _init_table(table: nn.Parameter, generators: Generators) -> None:
    nn.init.normal_(table, std=table.shape[1] ** -0.5, generator=generators("scale_shift_table"))
