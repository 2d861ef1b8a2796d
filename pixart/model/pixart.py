"""PixArt: a text-to-image diffusion transformer (PixArt-α, arXiv 2310.00426; PixArt-Σ, arXiv 2403.04692).

    tokens = patches + positions → depth × block(tokens, time, caption) → final layer → values of the patches

Parameters carry the names of the official files, so an official state dict loads as it is. What a block is made of
(conditioning, attention, norm, MLP), positions and routing are chosen by name, see `layers` and `embed`.
Letters in shape comments:
    B batch, C latent channels, H × W latent size, p patch size, h × w tokens, N = h·w, L caption tokens, D width
"""

from collections.abc import Callable, Collection
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from pixart.config import setting
from pixart.errors import InputError
from pixart.model.embed import POSITIONS, CaptionEmbedder, NumberEmbedder, PatchEmbed
from pixart.model.initialize import initialize
from pixart.model.layers import CONDITIONING, ROUTING, CaptionKV, Layout, put_back, take, with_extra
from pixart.seeds import Draw

Edit = Callable[[int, Tensor], Tensor]  # a block's number and the stream after it → the stream from there on


@dataclass(frozen=True)
class PixArtConfig:
    """Everything that makes a PixArt; the defaults are PixArt-α XL/2 at 256 px."""

    hidden_size: int = setting(1152, diffusers="any", described=True)
    depth: int = setting(28, diffusers="any", described=True)
    num_heads: int = setting(16, diffusers="told", described=True)
    mlp_ratio: float = 4.0
    patch_size: int = setting(2, diffusers="any", described=True)
    in_channels: int = setting(4, diffusers="any", compare="images")
    # 2·C output channels: the prediction and the variance
    learn_sigma: bool = setting(True, diffusers="any", compare="loss")
    caption_channels: int = setting(4096, diffusers="any", described=True)  # width of the text encoder's states
    # tokens of the null caption, and the length captions are cut to; diffusers' pipeline tells it by its class
    caption_length: int = setting(120, diffusers="any", start="shown", described=True)
    # embed the image's size and aspect ratio (α 1024-MS)
    micro_conditions: bool = setting(False, diffusers="any", start="shown", described=True)
    # native side of the latent, where token coordinates are whole numbers
    latent_size: int = setting(32, diffusers="told", described=True)
    position_scale: float = setting(1.0, diffusers="told", described=True)  # coordinates are divided by it
    kv_compression: Literal["conv", "uniform"] | None = setting(None, start="shown", described=True)
    # side of the square of tokens that becomes one key and value; means nothing without kv_compression, as the next
    kv_ratio: int = setting(2, diffusers="any", start="shown", described=True)
    kv_blocks: tuple[int, ...] = setting((), diffusers="any", start="shown", described=True)  # that compress
    qk_norm: bool = setting(False, start="shown", described=True)
    conditioning: str = "adaln_single"  # by name, as the next ones: a key of CONDITIONING
    positions: str = "sincos"  # of POSITIONS
    attention: str = "softmax"  # of ATTENTION
    norm: str = "layer_norm"  # of NORMS
    mlp: str = "gelu"  # of MLPS
    routing: str | None = None  # of ROUTING
    options: dict[str, Any] = field(default_factory=dict)  # what variants of one's own need besides, by their own names

    def __post_init__(self):
        for name in ("hidden_size", "depth", "num_heads", "patch_size", "in_channels", "caption_channels",
                     "caption_length", "latent_size", "mlp_ratio", "position_scale"):  # fmt: skip
            if getattr(self, name) <= 0:
                raise InputError(f"{name}: got {getattr(self, name)}, expected a positive number")
        if self.hidden_size % self.num_heads:
            raise InputError(f"hidden_size {self.hidden_size} is not a multiple of num_heads {self.num_heads}")
        if self.positions == "sincos" and self.hidden_size % 4:
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
        dim, conditioning = config.hidden_size, CONDITIONING[config.conditioning]
        self.x_embedder = PatchEmbed(config.in_channels, dim, config.patch_size)
        self.pos_embed = POSITIONS[config.positions](config)
        self.t_embedder = NumberEmbedder(dim)
        self.t_block = conditioning.shared(dim) if conditioning.shared else None
        self.extra_tokens = conditioning.tokens(dim) if conditioning.tokens else None
        if config.micro_conditions:
            self.csize_embedder = NumberEmbedder(dim // 3)
            self.ar_embedder = NumberEmbedder(dim // 3)
        self.y_embedder = CaptionEmbedder(config.caption_channels, dim, config.caption_length)
        self.blocks = nn.ModuleList(conditioning.block(config, i) for i in range(config.depth))
        self.final_layer = conditioning.final(config)
        self.routing = ROUTING[config.routing](config) if config.routing else None
        if fresh:
            initialize(self, seed)
        self.register_load_state_dict_pre_hook(_take_out_positions)

    @property
    def conditions(self) -> dict[str, Draw | None]:
        """Keywords that `forward` takes besides its own, and the random numbers of those that are drawn."""
        return dict(self.routing.conditions) if self.routing else {}

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        caption: Tensor | CaptionContext,
        caption_mask: Tensor | None = None,
        size: Tensor | None = None,
        aspect_ratio: Tensor | None = None,
        *,
        edit: Edit | None = None,
        keep: Collection[int] = (),
        **conditions: Tensor,
    ) -> Tensor | tuple[Tensor, dict[int, Tensor]]:
        """One prediction of the network.

        Args:
            x: noisy scaled latents (B, C, H, W); H and W any multiples of `patch_size`.
            t: times (B,), 0 (clean) … 999 (noise), fractional allowed.
            caption: text states (B, L, caption_channels), any L; or what `encode_caption` returned.
            caption_mask: (B, L), 1 = a token, 0 = padding; none means no padding. A row must keep a token.
            size: (B, 2) height and width in pixels; required with micro-conditions, refused without.
            aspect_ratio: (B,) height / width; likewise.
            edit: called after every block with its number and the stream (B, N, D), extra tokens first and routed
                tokens left out; what it returns goes on.
            keep: numbers of blocks whose hidden states are returned too.
            conditions: further tensors that the variant takes, those of `self.conditions`.

        Returns:
            (B, 2C, H, W) with `learn_sigma`: prediction and variance in [-1, 1]; else (B, C, H, W).
            With `keep` a pair: that, and {block: (B, N, D)}, the image's tokens alone, all of them.

        Raises:
            InputError: a shape does not fit the model. Values are never looked at: that would synchronise the device.
        """
        self._check_shapes(x, t, size, aspect_ratio)
        if unknown := conditions.keys() - self.conditions.keys():
            raise InputError(f"{min(unknown)}: this model takes no such condition; it takes {[*self.conditions]}")
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
        time = self.embed_time(t, size, aspect_ratio)                                   # (B, D)
        shared = time if self.t_block is None else self.t_block(time)                   # (B, 6·D) in adaLN-single
        x = self.x_embedder(x)                                                          # (B, N, D)
        x, layout = self._place(x, time, grid)                                          # (B, n + N, D)
        here, chosen, hidden = layout, None, {}
        for i, (block, block_caption) in enumerate(zip(self.blocks, captions, strict=True)):
            if self.routing is not None and i == self.routing.first:
                chosen = self.routing.choose(grid[0] * grid[1], conditions)             # (B, M) or None
                if chosen is not None:
                    chosen = with_extra(chosen, x.shape[1] - grid[0] * grid[1])
                    whole, x, here = x, take(x, chosen), layout.take(chosen)
            if self.gradient_checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, shared, block_caption, mask, here, use_reentrant=False)
            else:
                x = block(x, shared, block_caption, mask, here)                         # (B, n + N, D)
            x = x if edit is None else edit(i, x)
            if i in keep:
                hidden[i] = self._image(x if chosen is None else put_back(x, chosen, whole), grid)
            if chosen is not None and i == self.routing.last:
                x, here, chosen = put_back(x, chosen, whole), layout, None
        x = self.final_layer(self._image(x, grid), time)                                # (B, N, p·p·C_out)
        x = rearrange(x, "b (h w) (p q c) -> b c (h p) (w q)", h=grid[0], w=grid[1], p=p, q=p)
        return (x, hidden) if keep else x
        # fmt: on

    @staticmethod
    def from_pretrained(source: str | Path, **options: Any) -> "PixArt":
        """`pixart.load_model(source, **options)`, which says what it takes and raises: any PixArt in circulation, in
        eval mode."""
        from pixart import load_model  # files are no matter of this room: the package's surface knows them

        return load_model(source, **options)

    def save_pretrained(self, folder: str | Path, *, card: Any = None) -> None:
        """Write a new folder that `from_pretrained` and `Pipeline.from_pretrained` take.

        `card`, a `pixart.ModelCard`, is all that sampling needs besides; by default the one that it was loaded with.

        Raises:
            InputError: the folder is there, or there is no card.
            OSError: the disk is full or not writable; nothing is left behind.
        """
        from pixart import export_model

        export_model(self, folder, card=card)

    def encode_caption(self, caption: Tensor, caption_mask: Tensor | None = None) -> CaptionContext:
        """Every block's keys and values of a caption; sampling computes them once, not once a step.

        caption (B, L, caption_channels), caption_mask (B, L) as in `forward`.
        """
        tokens, mask = self._project_caption(caption, caption_mask)
        return CaptionContext(tuple(block.cross_attn.encode(tokens) for block in self.blocks), mask)

    def embed_time(self, t: Tensor, size: Tensor | None, aspect_ratio: Tensor | None) -> Tensor:
        """Time (and micro-conditions) → (B, D)."""
        time = self.t_embedder(t)
        if self.config.micro_conditions:
            sides = rearrange(self.csize_embedder(size.flatten()), "(b two) d -> b (two d)", two=2)
            time = time + torch.cat([sides, self.ar_embedder(aspect_ratio)], dim=-1)
        return time

    def positions(self, height: int, width: int, device=None) -> Tensor | None:
        """What is added to the stream of a grid of height × width tokens: fp32 (height·width, D) for sincos."""
        return self.pos_embed.added(height, width, device)

    def _place(self, x: Tensor, time: Tensor, grid: tuple[int, int]) -> tuple[Tensor, Layout]:
        """Patches (B, N, D) → the stream with positions, after n extra tokens, and where its tokens stand."""
        added, rotary = self.positions(*grid, device=x.device), self.pos_embed.rotary(*grid, device=x.device)
        x = x if added is None else x + added.to(x.dtype)
        if self.extra_tokens is None:
            return x, Layout(grid, rotary)
        tokens = self.extra_tokens(time).to(x.dtype)  # (B, n, D)
        if rotary is not None:  # they stand nowhere: angle 0
            cos, sin = (
                F.pad(rotary[0], (0, 0, tokens.shape[1], 0), value=1.0),
                F.pad(rotary[1], (0, 0, tokens.shape[1], 0)),
            )
            rotary = torch.stack([cos, sin])
        return torch.cat([tokens, x], dim=1), Layout(None, rotary)

    @staticmethod
    def _image(x: Tensor, grid: tuple[int, int]) -> Tensor:
        """The stream without extra tokens: (B, N, D)."""
        extra = x.shape[1] - grid[0] * grid[1]
        return x[:, extra:] if extra else x

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
    stored = state.pop(prefix + "pos_embed", None) if model.config.positions == "sincos" else None
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
