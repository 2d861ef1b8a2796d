"""PixArt: a text-to-image diffusion transformer (PixArt-α, arXiv 2310.00426; PixArt-Σ, arXiv 2403.04692).

    tokens = patches + positions → depth × block(tokens, time, caption) → final layer → values of the patches

Parameters have the names of the official files, so an official state dict loads as it is. The parts of a block
(conditioning, attention, norm, MLP), positions and token routing are chosen by name, see `layers` and `embed`.
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

from pixart.arguments import say
from pixart.config import setting
from pixart.errors import InputError
from pixart.model.embed import POSITIONS, CaptionEmbedder, NumberEmbedder, PatchEmbed
from pixart.model.initialize import initialize
from pixart.model.layers import CONDITIONING, ROUTING, CaptionKV, Layout, put_back, take, with_extra
from pixart.ranges import check_choices, check_numbers
from pixart.seeds import Draw

Edit = Callable[[int, Tensor], Tensor]  # (block number, its output tokens) → the tokens passed on


@dataclass(frozen=True)
class PixArtConfig:
    """All settings of the network; the defaults are PixArt-α XL/2 at 256 px."""

    hidden_size: int = setting(1152, least=1, most=65536, diffusers="any", described=True)
    depth: int = setting(28, least=1, most=1024, diffusers="any", described=True)
    num_heads: int = setting(16, least=1, most=65536, diffusers="told", described=True)
    mlp_ratio: float = setting(4.0, above=0, most=1024)
    patch_size: int = setting(2, least=1, most=1024, diffusers="any", described=True)
    in_channels: int = setting(4, least=1, most=65536, diffusers="any", compare="images")
    # 2·C output channels: prediction and variance
    learn_sigma: bool = setting(True, diffusers="any", compare="loss")
    # width of the text encoder's states
    caption_channels: int = setting(4096, least=1, most=65536, diffusers="any", described=True)
    # tokens of the null caption, and the length to which captions are truncated
    caption_length: int = setting(120, least=1, most=65536, diffusers="any", start="shown", described=True)
    # embed the image's size and aspect ratio (α 1024-MS)
    micro_conditions: bool = setting(False, diffusers="any", start="shown", described=True)
    # native side of the latent, the reference for positions (see `grid_positions`)
    latent_size: int = setting(32, least=1, most=4096, diffusers="told", described=True)
    position_scale: float = setting(1.0, above=0, diffusers="told", described=True)  # divides the token coordinates
    kv_compression: Literal["conv", "ave", "uniform", "uniform_every"] | None = setting(
        None, start="shown", described=True
    )
    # side of the square of tokens reduced to one key and value, or the stride of "uniform_every"; ignored without
    # kv_compression
    kv_ratio: int = setting(2, least=1, most=1024, diffusers="any", start="shown", described=True)
    # numbers of the blocks that compress
    kv_blocks: tuple[int, ...] = setting((), least=0, diffusers="any", start="shown", described=True)
    # norm of queries and keys; files of earlier versions say false for "none" and true for "layer_norm"
    qk_norm: Literal["none", "layer_norm", "rms_norm"] | bool = setting(False, start="shown", described=True)
    # a key of CONDITIONING: adaln_single, adaln_per_block, time_token, dit
    conditioning: str = setting("adaln_single", official="default")
    positions: str = setting("sincos", official="default")  # a key of POSITIONS: sincos, learned, rope2d
    attention: str = setting("softmax", official="default")  # a key of ATTENTION
    norm: str = setting("layer_norm", official="default")  # a key of NORMS: layer_norm, rms_norm
    mlp: str = setting("gelu", official="default")  # a key of MLPS: gelu, swiglu
    routing: str | None = None  # a key of ROUTING: tread
    # first and last block that routed tokens skip, and the fraction of tokens that skip them; for routing "tread"
    route_blocks: tuple[int, int] | None = setting(None, diffusers="any", least=0)
    route_ratio: float = setting(0.5, diffusers="any", least=0, below=1)
    options: dict[str, Any] = field(default_factory=dict)  # further settings of user-defined variants

    def __post_init__(self):
        check_numbers(self)
        check_choices(self)
        object.__setattr__(self, "qk_norm", {"none": False, "layer_norm": True}.get(self.qk_norm, self.qk_norm))
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
        if self.kv_blocks and self.positions == "rope2d":
            raise InputError(
                "kv_compression: positions 'rope2d' turn every key, so that none can be merged; leave one out"
            )
        if self.routing == "tread":
            self._check_route()

    def _check_route(self) -> None:
        if self.route_blocks is None:
            raise InputError(
                "route_blocks: routing 'tread' needs the first and last block that tokens skip, e.g. [2, 23]"
            )
        first, last = self.route_blocks
        if not first <= last < self.depth:
            raise InputError(
                f"route_blocks {[first, last]}: expected first ≤ last, of the blocks 0 to {self.depth - 1}"
            )
        if inside := [i for i in self.kv_blocks if first <= i <= last]:
            raise InputError(
                f"kv_blocks {inside}: KV compression needs all tokens, which route_blocks takes out of them"
            )

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


COMPILATIONS = 64  # largest number of times a block is compiled


class CaptionContext(NamedTuple):
    """An encoded caption: returned by `encode_caption`, accepted by `forward` in place of a caption."""

    blocks: tuple[CaptionKV, ...]
    mask: Tensor | None  # (B, 1, 1, L) bool, True = keep

    def first(self, count: int) -> "CaptionContext":
        """The first `count` captions of the batch, as views."""
        blocks = tuple((k[:count], v[:count]) for k, v in self.blocks)
        return CaptionContext(blocks, None if self.mask is None else self.mask[:count])


class PixArt(nn.Module):
    """The network; see `forward` for its inputs. Weights are initialised from the authors' distributions."""

    def __init__(self, config: PixArtConfig):
        super().__init__()
        if not isinstance(config, PixArtConfig):
            raise InputError(f"config: got {say(config)}, expected a PixArtConfig")
        self.config = config
        self.gradient_checkpointing, self.checkpointing_every = False, 1
        fresh = torch.get_default_device().type != "meta"  # on the meta device weights are loaded, not initialised
        # drawn before the layers are built, because the number of draws they make depends on the variant
        seed = int(torch.randint(2**62, (), device="cpu")) if fresh else 0
        dim, conditioning = config.hidden_size, CONDITIONING[config.conditioning]
        self.x_embedder = PatchEmbed(config.in_channels, dim, config.patch_size)
        self.pos_embed = POSITIONS[config.positions](config)
        self.t_embedder = NumberEmbedder(dim)
        self.t_block = conditioning.shared(dim) if conditioning.shared else None
        self.extra_tokens = conditioning.tokens(dim) if conditioning.tokens else None
        self.pool = conditioning.pool
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
        """Names of the further keyword arguments of `forward`, each with how training draws it (None: not drawn)."""
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
            t: times (B,), 0 (clean) … 999 (noise), fractional allowed; not in half precision, which rounds them.
            caption: text states (B, L, caption_channels), any L; or what `encode_caption` returned.
            caption_mask: (B, L), 1 = a token, 0 = padding; None means no padding. Every row must keep a token.
            size: (B, 2) height and width in pixels; required with micro-conditions, refused otherwise.
            aspect_ratio: (B,) height / width; likewise.
            edit: called after every block with its number and its output (B, N, D), which begins with any extra tokens
                and lacks tokens routed around the block; its return value replaces the output.
            keep: numbers of the blocks whose hidden states are returned as well.
            conditions: further tensors that the variant takes, named in `self.conditions`.

        Returns:
            (B, 2C, H, W) with `learn_sigma`: prediction and variance in [-1, 1]; else (B, C, H, W).
            With `keep`, a pair: this tensor, and {block number: (B, N, D)} with all image tokens and no extra tokens.

        Raises:
            InputError: a shape does not fit the model, or t, size or aspect_ratio are in half precision. Values are not
                checked: that would synchronise the device.
        """
        self._check_shapes(x, t, size, aspect_ratio)
        if edit is not None and not callable(edit):
            raise InputError(f"edit: got {say(edit)}, expected a function")
        if not isinstance(keep, Collection) or isinstance(keep, (str, Tensor)):
            raise InputError(f"keep: got {say(keep)}, expected numbers of blocks")
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
            captions = [tokens] * len(self.blocks)  # each block computes its keys and values: less to keep

        # fmt: off
        time = self.embed_time(t, size, aspect_ratio)                                   # (B, D)
        if self.pool is not None:
            time = time + self.pool(captions[0], mask)                                  # (B, D)
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
            if self.gradient_checkpointing and i % self.checkpointing_every == 0 and torch.is_grad_enabled():
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
        """Load a model in eval mode: `pixart.load_model(source, **options)`, which documents options and errors."""
        from pixart import load_model  # imported here because the model room may not depend on file formats

        return load_model(source, **options)

    def save_pretrained(self, folder: str | Path, *, card: Any = None) -> None:
        """Write a new folder that `from_pretrained` and `Pipeline.from_pretrained` read.

        `card`, a `pixart.ModelCard`, holds what sampling needs besides weights; by default the one loaded with them.

        Raises:
            InputError: the folder already exists, or there is no card.
            OSError: the disk is full or not writable; no partial folder is left.
        """
        from pixart import export_model

        export_model(self, folder, card=card)

    def encode_caption(self, caption: Tensor, caption_mask: Tensor | None = None) -> CaptionContext:
        """The keys and values of a caption for every block, so that sampling computes them once and not in every step.

        caption (B, L, caption_channels), caption_mask (B, L) as in `forward`.
        """
        tokens, mask = self._project_caption(caption, caption_mask)
        return CaptionContext(tuple(block.encode_caption(tokens) for block in self.blocks), mask)

    def embed_time(self, t: Tensor, size: Tensor | None, aspect_ratio: Tensor | None) -> Tensor:
        """Embed the time, and the micro-conditions if the model has them → (B, D)."""
        time = self.t_embedder(t)
        if self.config.micro_conditions:
            sides = rearrange(self.csize_embedder(size.flatten()), "(b two) d -> b (two d)", two=2)
            time = time + torch.cat([sides, self.ar_embedder(aspect_ratio)], dim=-1)
        return time

    def positions(self, height: int, width: int, device=None) -> Tensor | None:
        """Positions added to the tokens of a grid of height × width: fp32 (height·width, D) for sincos, or None."""
        return self.pos_embed.added(height, width, device)

    def _place(self, x: Tensor, time: Tensor, grid: tuple[int, int]) -> tuple[Tensor, Layout]:
        """Add positions to patches (B, N, D) and prepend n extra tokens → (B, n + N, D) and their layout."""
        added, rotary = self.positions(*grid, device=x.device), self.pos_embed.rotary(*grid, device=x.device)
        x = x if added is None else x + added.to(x.dtype)
        if self.extra_tokens is None:
            return x, Layout(grid, rotary)
        tokens = self.extra_tokens(time).to(x.dtype)  # (B, n, D)
        if rotary is not None:  # extra tokens have no position: angle 0
            cos, sin = (
                F.pad(rotary[0], (0, 0, tokens.shape[1], 0), value=1.0),
                F.pad(rotary[1], (0, 0, tokens.shape[1], 0)),
            )
            rotary = torch.stack([cos, sin])
        return torch.cat([tokens, x], dim=1), Layout(None, rotary)

    @staticmethod
    def _image(x: Tensor, grid: tuple[int, int]) -> Tensor:
        """x without its extra tokens: (B, N, D)."""
        extra = x.shape[1] - grid[0] * grid[1]
        return x[:, extra:] if extra else x

    def compile_blocks(self, **options) -> None:
        """`torch.compile` each block in place; all blocks share the compiled code, and state-dict names do not change.

        The first change of a size (bucket, caption length, batch) compiles once more, for all sizes; using a mask for
        the first time, or a batch or caption of length 1, compiles again. `options` are those of torch.compile;
        `dynamic=False` compiles every size separately.
        """
        # with fullgraph=True torch raises when a function exceeds the limit, whose default is lower than these cases
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, COMPILATIONS)
        for block in self.blocks:
            block.compile(fullgraph=True, **options)

    def _project_caption(self, caption: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        channels = self.config.caption_channels
        for name, value in (("caption", caption), ("caption_mask", mask)):
            if not isinstance(value, Tensor) and not (value is None and name == "caption_mask"):
                raise InputError(f"{name}: got {say(value)}, expected a tensor")
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
        for name, value in (("x", x), ("t", t)):
            if not isinstance(value, Tensor):
                raise InputError(f"{name}: got {say(value)}, expected a tensor")
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
            elif not isinstance(value, Tensor) or tuple(value.shape) != shape:
                got = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else say(value)
                raise InputError(f"{name}: got {got}, expected shape {shape}")
            elif value.dtype in (torch.float16, torch.bfloat16):
                raise InputError(
                    f"{name}: got {str(value.dtype).removeprefix('torch.')}, in which numbers are already rounded (951 "
                    "to 952 in bfloat16); expected float32, or whole numbers, whatever the weights' dtype"
                )


def _take_out_positions(model: PixArt, state: dict, prefix: str, *_) -> None:
    """Official files contain the position table used in training: compare it with the computed one, do not load it."""
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
