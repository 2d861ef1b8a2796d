"""PixArt: a text-to-image diffusion transformer (PixArt-α, arXiv 2310.00426; PixArt-Σ, arXiv 2403.04692).

    tokens = patches + positions → depth × block(tokens, time, caption) → final layer → pixels of the patches

Parameters carry the names of the official files, so an official state dict loads as it is.
Letters in shape comments:
    B batch, C latent channels, H × W latent size, p patch size, h × w tokens, N = h·w, L caption tokens, D width
"""

from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from pixart.errors import InputError
from pixart.model.embed import CaptionEmbedder, NumberEmbedder, PatchEmbed, grid_positions
from pixart.model.layers import Block, CaptionKV, FinalLayer
from pixart.seeds import derive_seed


@dataclass(frozen=True)
class PixArtConfig:
    """Everything that makes a PixArt; the defaults are PixArt-α XL/2 at 256 px."""

    hidden_size: int = 1152
    depth: int = 28
    num_heads: int = 16
    mlp_ratio: float = 4.0
    patch_size: int = 2
    in_channels: int = 4
    learn_sigma: bool = True  # 2·C output channels: the prediction and the variance
    caption_channels: int = 4096  # width of the text encoder's states
    caption_length: int = 120  # tokens of the null caption, and the length captions are cut to
    micro_conditions: bool = False  # embed the picture's size and aspect ratio (α 1024-MS)
    latent_size: int = 32  # native side of the latent, where token coordinates are whole numbers
    position_scale: float = 1.0  # coordinates are divided by it
    kv_compression: Literal["conv", "uniform"] | None = None
    kv_ratio: int = 2  # side of the square of tokens that becomes one key and value
    kv_blocks: tuple[int, ...] = ()  # the blocks that compress
    qk_norm: bool = False

    def __post_init__(self):
        for name in ("hidden_size", "depth", "num_heads", "patch_size", "in_channels", "caption_channels",
                     "caption_length", "latent_size", "mlp_ratio", "position_scale"):  # fmt: skip
            if getattr(self, name) <= 0:
                raise InputError(f"{name}: got {getattr(self, name)}, expected a positive number")
        if self.hidden_size % self.num_heads:
            raise InputError(f"hidden_size {self.hidden_size} is not a multiple of num_heads {self.num_heads}")
        if self.hidden_size % 4:
            raise InputError(f"hidden_size {self.hidden_size} is not a multiple of 4, which 2-D sin-cos positions need")
        if self.micro_conditions and self.hidden_size % 3:
            raise InputError(f"hidden_size {self.hidden_size} is not a multiple of 3, which micro_conditions need")
        if self.latent_size % self.patch_size:
            raise InputError(f"latent_size {self.latent_size} is not a multiple of patch_size {self.patch_size}")
        if bool(self.kv_blocks) != (self.kv_compression is not None):
            raise InputError("kv_compression and kv_blocks belong together: set both or neither")
        if outside := [i for i in self.kv_blocks if not 0 <= i < self.depth]:
            raise InputError(f"kv_blocks {outside}: the model has blocks 0 to {self.depth - 1}")
        if self.kv_compression and self.kv_ratio < 2:
            raise InputError(f"kv_ratio: got {self.kv_ratio}, expected at least 2")

    @property
    def out_channels(self) -> int:
        return self.in_channels * (2 if self.learn_sigma else 1)

    @classmethod
    def from_preset(cls, name: str) -> "PixArtConfig":
        if name not in PRESETS:
            raise InputError(f"unknown preset '{name}'; there are {', '.join(PRESETS)}")
        return PRESETS[name]


_XL = PixArtConfig()
_SIGMA = replace(_XL, caption_length=300)
PRESETS: dict[str, PixArtConfig] = {
    # sizes, as DiT names them
    "XL/2": _XL,
    "L/2": replace(_XL, hidden_size=1024, depth=24),
    "B/2": replace(_XL, hidden_size=768, depth=12, num_heads=12),
    "S/2": replace(_XL, hidden_size=384, depth=12, num_heads=6),
    # released models
    "alpha-256": _XL,
    "alpha-512": replace(_XL, latent_size=64),
    "alpha-1024": replace(_XL, latent_size=128, position_scale=2.0, micro_conditions=True),
    "sigma-256": replace(_SIGMA, position_scale=0.5),
    "sigma-512": replace(_SIGMA, latent_size=64),
    "sigma-1024": replace(_SIGMA, latent_size=128, position_scale=2.0),
    "sigma-2k": replace(_SIGMA, latent_size=256, position_scale=4.0),
}


COMPILATIONS = 64  # of a block at the most


class CaptionContext(NamedTuple):
    """A caption as the blocks see it; what `encode_caption` returns and `forward` takes in place of a caption."""

    blocks: tuple[CaptionKV, ...]
    mask: Tensor | None  # (B, 1, 1, L) bool, True = keep

    def first(self, count: int) -> "CaptionContext":
        """The first `count` captions of the batch, as views."""
        blocks = tuple((k[:count], v[:count]) for k, v in self.blocks)
        return CaptionContext(blocks, None if self.mask is None else self.mask[:count])


class PixArt(nn.Module):
    """The network. See `forward` for its inputs; weights start as the authors' do."""

    def __init__(self, config: PixArtConfig):
        super().__init__()
        self.config = config
        self.gradient_checkpointing = False
        fresh = torch.get_default_device().type != "meta"  # else to be loaded into: nothing to draw or initialise
        # before the layers draw, whose number differs from idea to idea
        seed = int(torch.randint(2**62, (), device="cpu")) if fresh else 0
        dim = config.hidden_size
        self.x_embedder = PatchEmbed(config.in_channels, dim, config.patch_size)
        self.t_embedder = NumberEmbedder(dim)
        self.t_block = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))
        if config.micro_conditions:
            self.csize_embedder = NumberEmbedder(dim // 3)
            self.ar_embedder = NumberEmbedder(dim // 3)
        self.y_embedder = CaptionEmbedder(config.caption_channels, dim, config.caption_length)
        self.blocks = nn.ModuleList(
            Block(
                dim, config.num_heads, config.mlp_ratio, qk_norm=config.qk_norm, ratio=config.kv_ratio,
                compression=config.kv_compression if i in config.kv_blocks else None,
            )
            for i in range(config.depth)
        )  # fmt: skip
        self.final_layer = FinalLayer(dim, config.patch_size**2 * config.out_channels)
        if fresh:
            self.initialize_weights(seed)
        self.register_load_state_dict_pre_hook(_take_out_positions)

    @torch.no_grad()
    def initialize_weights(self, seed: int) -> None:
        """The authors' initialisation; output and cross-attention start at zero, so a block starts without captions.

        Every tensor has a generator of its own, from `seed` and its name: networks that differ in one idea start alike
        in all else.
        """
        tensors = {**dict(self.named_parameters()), **dict(self.named_buffers())}

        def by(name: str) -> torch.Generator:
            return torch.Generator(tensors[name].device).manual_seed(derive_seed(seed, name))

        for name, module in self.named_modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight, generator=by(f"{name}.weight"))
                nn.init.zeros_(module.bias)
        patches = self.x_embedder.proj.weight.flatten(1)  # (D, p·p·C)
        nn.init.xavier_uniform_(patches, generator=by("x_embedder.proj.weight"))
        bound = patches.shape[1] ** -0.5
        nn.init.uniform_(self.x_embedder.proj.bias, -bound, bound, generator=by("x_embedder.proj.bias"))
        for name, parameter in self.named_parameters():
            embedders = ("t_embedder.", "csize_embedder.", "ar_embedder.", "t_block.", "y_embedder.")
            if name.startswith(embedders) and name.endswith("weight"):
                nn.init.normal_(parameter, std=0.02, generator=by(name))
            elif name.endswith("scale_shift_table"):
                nn.init.normal_(parameter, std=self.config.hidden_size**-0.5, generator=by(name))
        for block in self.blocks:
            nn.init.zeros_(block.cross_attn.proj.weight)
            if block.attn.compression == "conv":  # starts as the mean of a square
                nn.init.constant_(block.attn.sr.weight, block.attn.ratio**-2)
                nn.init.zeros_(block.attn.sr.bias)
        nn.init.zeros_(self.final_layer.linear.weight)
        null = "y_embedder.y_embedding"
        nn.init.normal_(tensors[null], std=self.config.caption_channels**-0.5, generator=by(null))

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        caption: Tensor | CaptionContext,
        caption_mask: Tensor | None = None,
        size: Tensor | None = None,
        aspect_ratio: Tensor | None = None,
    ) -> Tensor:
        """One prediction of the network.

        Args:
            x: noisy scaled latents (B, C, H, W); H and W any multiples of `patch_size`.
            t: times (B,), 0 (clean) … 999 (noise), fractional allowed.
            caption: text states (B, L, caption_channels), any L; or what `encode_caption` returned.
            caption_mask: (B, L), 1 = a token, 0 = padding; none means no padding. A row must keep a token.
            size: (B, 2) height and width in pixels; required with micro-conditions, refused without.
            aspect_ratio: (B,) height / width; likewise.

        Returns:
            (B, 2C, H, W) with `learn_sigma`: prediction and variance in [-1, 1]; else (B, C, H, W).

        Raises:
            InputError: a shape does not fit the model. Values are never looked at: that would synchronise the device.
        """
        self._check_shapes(x, t, size, aspect_ratio)
        p = self.config.patch_size
        grid = (x.shape[-2] // p, x.shape[-1] // p)
        if isinstance(caption, CaptionContext):
            if caption_mask is not None:
                raise InputError("caption_mask: an encoded caption carries its mask; leave it out")
            captions, mask = caption.blocks, caption.mask
        else:
            tokens, mask = self._project_caption(caption, caption_mask)  # (B, L, D), (B, 1, 1, L)
            captions = [tokens] * len(self.blocks)  # each block makes its keys: cheaper to checkpoint

        # fmt: off
        time, time6 = self.embed_time(t, size, aspect_ratio)                            # (B, D), (B, 6, D)
        x = self.x_embedder(x)                                                          # (B, N, D)
        x = x + self.positions(*grid, device=x.device).to(x.dtype)
        for block, block_caption in zip(self.blocks, captions, strict=True):
            if self.gradient_checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, time6, block_caption, mask, grid, use_reentrant=False)
            else:
                x = block(x, time6, block_caption, mask, grid)                          # (B, N, D)
        x = self.final_layer(x, time)                                                   # (B, N, p·p·C_out)
        return rearrange(x, "b (h w) (p q c) -> b c (h p) (w q)", h=grid[0], w=grid[1], p=p, q=p)
        # fmt: on

    def encode_caption(self, caption: Tensor, caption_mask: Tensor | None = None) -> CaptionContext:
        """Every block's keys and values of a caption; sampling computes them once, not once a step.

        caption (B, L, caption_channels), caption_mask (B, L) as in `forward`.
        """
        tokens, mask = self._project_caption(caption, caption_mask)
        return CaptionContext(tuple(block.cross_attn.encode(tokens) for block in self.blocks), mask)

    def embed_time(self, t: Tensor, size: Tensor | None, aspect_ratio: Tensor | None) -> tuple[Tensor, Tensor]:
        """Time (and micro-conditions) → (B, D) for the final layer and (B, 6, D) for the blocks."""
        time = self.t_embedder(t)
        if self.config.micro_conditions:
            sides = rearrange(self.csize_embedder(size.flatten()), "(b two) d -> b (two d)", two=2)
            time = time + torch.cat([sides, self.ar_embedder(aspect_ratio)], dim=-1)
        return time, rearrange(self.t_block(time), "b (six d) -> b six d", six=6)

    def positions(self, height: int, width: int, device=None) -> Tensor:
        """Positions of a grid of height × width tokens → fp32 (height·width, D)."""
        c = self.config
        base = c.latent_size // c.patch_size
        return grid_positions(height, width, c.hidden_size, base=base, scale=c.position_scale, device=device)

    def compile_blocks(self, **options) -> None:
        """`torch.compile` each block in place: one compilation serves all, state-dict names stay as they are.

        Sizes that vary (buckets, captions, batches) cost a second compilation and then no more; a first mask, or a
        batch or caption of one, is another case. `options` are torch.compile's; `dynamic=False` compiles every size.
        """
        # these cases add up to more than torch expects of a function, and past its limit it raises
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, COMPILATIONS)
        for block in self.blocks:
            block.compile(fullgraph=True, **options)

    def _project_caption(self, caption: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        channels = self.config.caption_channels
        if caption.ndim != 3 or caption.shape[-1] != channels:
            raise InputError(
                f"caption: got shape {tuple(caption.shape)}, expected (B, L, {channels}); "
                "the text encoder's width must be the model's caption_channels"
            )
        if mask is not None:
            if mask.shape != caption.shape[:2]:
                raise InputError(f"caption_mask: got shape {tuple(mask.shape)}, expected {tuple(caption.shape[:2])}")
            mask = mask.bool()[:, None, None, :]
        return self.y_embedder(caption), mask

    def _check_shapes(self, x: Tensor, t: Tensor, size: Tensor | None, aspect_ratio: Tensor | None) -> None:
        c = self.config
        if x.ndim != 4 or x.shape[1] != c.in_channels:
            raise InputError(f"x: got shape {tuple(x.shape)}, expected (B, {c.in_channels}, H, W)")
        if x.shape[2] % c.patch_size or x.shape[3] % c.patch_size:
            raise InputError(
                f"x: latent size {x.shape[2]} × {x.shape[3]} is not a multiple of the patch size {c.patch_size}"
            )
        batch = x.shape[0]
        expected = {"t": (t, (batch,)), "size": (size, (batch, 2)), "aspect_ratio": (aspect_ratio, (batch,))}
        for name, (value, shape) in expected.items():
            if name != "t" and not c.micro_conditions:
                if value is not None:
                    raise InputError(f"{name}: this model has no micro-conditions; leave it out")
            elif value is None or tuple(value.shape) != shape:
                got = "nothing" if value is None else f"shape {tuple(value.shape)}"
                raise InputError(f"{name}: got {got}, expected shape {shape}")


def _take_out_positions(model: PixArt, state: dict, prefix: str, *_) -> None:
    """Official files carry the position table they were trained with: check it against ours, never load it."""
    stored = state.pop(prefix + "pos_embed", None)
    if stored is None:
        return
    side = model.config.latent_size // model.config.patch_size
    expected = model.positions(side, side)[None]
    if stored.shape != expected.shape:
        raise InputError(
            f"pos_embed: the file's table has shape {tuple(stored.shape)}, this model's {tuple(expected.shape)}; "
            f"set latent_size to the file's native side (now {model.config.latent_size})"
        )
    error = (stored.detach().float().cpu() - expected).abs().max().item()
    tolerance = 1e-5 if stored.dtype in (torch.float32, torch.float64) else 1e-2
    if not error <= tolerance:  # a NaN fails too
        raise InputError(
            f"pos_embed: the file's table differs from this model's by {error:.3g}; "
            f"it was trained with another position_scale than {model.config.position_scale}"
        )
