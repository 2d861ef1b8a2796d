"""The autoencoder of latent diffusion (arXiv 2112.10752), which loads the VAE files of Stable Diffusion and SDXL.

    pixels → encoder → quant_conv → mean and log-variance;  latents → post_quant_conv → decoder → pixels

Parameters have diffusers' names, so its files load without conversion.
Letters in shape comments:
    B batch, C channels, H × W size in pixels, Z latent channels, f downsample, h × w = H/f × W/f, N = h·w
"""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from pixart.arguments import say
from pixart.config import build
from pixart.encoders.vae_files import CONFIG, check_state, find_weights, read_settings, read_weights
from pixart.errors import InputError

# settings of diffusers that are the same for all VAEs of SD and SDXL; another value means another network
_ONLY = {
    "act_fn": "silu",
    "mid_block_add_attention": True,
    "use_quant_conv": True,
    "use_post_quant_conv": True,
    "shift_factor": None,
    "latents_mean": None,
    "latents_std": None,
}
MOST = 2**16  # maximum of any number in a config, so that what is built before the weights are checked stays small
_BLOCK_TYPES = {"down_block_types": "DownEncoderBlock2D", "up_block_types": "UpDecoderBlock2D"}


@dataclass(frozen=True)
class VaeConfig:
    """The configuration of a VAE; the defaults are SD's, SDXL's differs only in `scaling_factor` (0.13025)."""

    in_channels: int = 3
    out_channels: int = 3
    latent_channels: int = 4
    block_out_channels: tuple[int, ...] = (128, 256, 512, 512)  # every level but the last halves the size
    layers_per_block: int = 2
    norm_num_groups: int = 32
    scaling_factor: float = 0.18215  # scaled latents = factor · latents, to have about unit variance
    force_upcast: bool = True  # not safe in fp16; the default is diffusers' for files that do not say

    def __post_init__(self):
        numbers = {
            name: (getattr(self, name),)
            for name in (
                "in_channels",
                "out_channels",
                "latent_channels",
                "layers_per_block",
                "norm_num_groups",
                "scaling_factor",
            )
        }
        for name, values in {**numbers, "block_out_channels": self.block_out_channels}.items():
            if not values or not all(0 < value <= MOST for value in values):  # refuses NaN, too
                raise InputError(f"{name}: got {say(getattr(self, name))}, expected positive numbers up to {MOST}")
        if odd := [c for c in self.block_out_channels if c % self.norm_num_groups]:
            raise InputError(f"block_out_channels {odd}: not multiples of norm_num_groups {self.norm_num_groups}")

    @property
    def downsample(self) -> int:
        """f, pixels per latent pixel along each side."""
        return 2 ** (len(self.block_out_channels) - 1)

    @classmethod
    def from_diffusers(cls, settings: dict) -> "VaeConfig":
        """From a `config.json` of diffusers.

        Raises:
            InputError: it is another class of autoencoder, or has a setting that this network does not support.
        """
        if (name := settings.get("_class_name", "AutoencoderKL")) != "AutoencoderKL":
            raise InputError(f"_class_name: got {name}, expected AutoencoderKL")
        # sample_size is the size above which diffusers tiles, not a property of the network
        settings = {key: value for key, value in settings.items() if key[0] != "_" and key != "sample_size"}
        for key, only in _ONLY.items():
            if (value := settings.pop(key, only)) != only:
                raise InputError(f"{key}: got {say(value)}, only {say(only)} is supported")
        for key, only in _BLOCK_TYPES.items():
            value = settings.pop(key, ())
            other = [kind for kind in value if kind != only] if isinstance(value, (list, tuple)) else [value]
            if other:
                raise InputError(f"{key}: got {say(other[0])}, only {only} is supported")
        return build(cls, settings)


class Resnet(nn.Module):
    """Two normalised convolutions with a skip connection; (B, C_in, H, W) → (B, C_out, H, W)."""

    def __init__(self, in_channels: int, out_channels: int, groups: int):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, in_channels, eps=1e-6)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = nn.GroupNorm(groups, out_channels, eps=1e-6)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        inner = self.conv1(F.silu(self.norm1(x)))
        return self.conv_shortcut(x) + self.conv2(F.silu(self.norm2(inner)))


class Attention(nn.Module):
    """Self-attention with one head among all positions, with a skip connection; (B, C, h, w) → the same."""

    def __init__(self, channels: int, groups: int):
        super().__init__()
        self.group_norm = nn.GroupNorm(groups, channels, eps=1e-6)
        self.to_q = nn.Linear(channels, channels)
        self.to_k = nn.Linear(channels, channels)
        self.to_v = nn.Linear(channels, channels)
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])

    def forward(self, x: Tensor) -> Tensor:
        tokens = rearrange(self.group_norm(x), "b c h w -> b 1 (h w) c")  # (B, 1, N, C)
        tokens = F.scaled_dot_product_attention(self.to_q(tokens), self.to_k(tokens), self.to_v(tokens))
        # the sum takes the memory layout of its first term (channels last), as in diffusers: the same bits
        return rearrange(self.to_out[0](tokens), "b 1 (h w) c -> b c h w", h=x.shape[2]) + x


class Downsample(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))  # only right and bottom, as in training


class Upsample(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Level(nn.Module):
    """Residual blocks at one size, then down- or upsampling to the next."""

    def __init__(self, in_channels: int, out_channels: int, depth: int, groups: int, *, down=False, up=False):
        super().__init__()
        self.resnets = nn.ModuleList(
            Resnet(in_channels if i == 0 else out_channels, out_channels, groups) for i in range(depth)
        )
        self.downsamplers = nn.ModuleList([Downsample(out_channels)] if down else [])
        self.upsamplers = nn.ModuleList([Upsample(out_channels)] if up else [])

    def forward(self, x: Tensor) -> Tensor:
        for layer in (*self.resnets, *self.downsamplers, *self.upsamplers):
            x = layer(x)
        return x


class MidBlock(nn.Module):
    def __init__(self, channels: int, groups: int):
        super().__init__()
        self.attentions = nn.ModuleList([Attention(channels, groups)])
        self.resnets = nn.ModuleList(Resnet(channels, channels, groups) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        return self.resnets[1](self.attentions[0](self.resnets[0](x)))


class Encoder(nn.Module):
    """Pixels (B, 3, H, W) → (B, 2·Z, h, w)."""

    def __init__(self, config: VaeConfig):
        super().__init__()
        widths, groups = config.block_out_channels, config.norm_num_groups
        self.conv_in = nn.Conv2d(config.in_channels, widths[0], 3, padding=1)
        self.down_blocks = nn.ModuleList(
            Level(before, width, config.layers_per_block, groups, down=i + 1 < len(widths))
            for i, (before, width) in enumerate(zip((widths[0], *widths), widths, strict=False))
        )
        self.mid_block = MidBlock(widths[-1], groups)
        self.conv_norm_out = nn.GroupNorm(groups, widths[-1], eps=1e-6)
        self.conv_out = nn.Conv2d(widths[-1], 2 * config.latent_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for level in self.down_blocks:
            x = level(x)
        return self.conv_out(F.silu(self.conv_norm_out(self.mid_block(x))))


class Decoder(nn.Module):
    """Latents (B, Z, h, w) → pixels (B, 3, H, W)."""

    def __init__(self, config: VaeConfig):
        super().__init__()
        widths, groups = config.block_out_channels[::-1], config.norm_num_groups
        self.conv_in = nn.Conv2d(config.latent_channels, widths[0], 3, padding=1)
        self.mid_block = MidBlock(widths[0], groups)
        self.up_blocks = nn.ModuleList(
            Level(before, width, config.layers_per_block + 1, groups, up=i + 1 < len(widths))
            for i, (before, width) in enumerate(zip((widths[0], *widths), widths, strict=False))
        )
        self.conv_norm_out = nn.GroupNorm(groups, widths[-1], eps=1e-6)
        self.conv_out = nn.Conv2d(widths[-1], config.out_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.mid_block(self.conv_in(x))
        for level in self.up_blocks:
            x = level(x)
        return self.conv_out(F.silu(self.conv_norm_out(x)))


class AutoencoderKL(nn.Module):
    """The network itself, with unscaled latents."""

    def __init__(self, config: VaeConfig):
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.quant_conv = nn.Conv2d(2 * config.latent_channels, 2 * config.latent_channels, 1)
        self.post_quant_conv = nn.Conv2d(config.latent_channels, config.latent_channels, 1)
        self.register_load_state_dict_pre_hook(_rename_old_attention)

    def encode(self, pixels: Tensor) -> Tensor:
        """Pixels (B, 3, H, W) in [-1, 1] → mean and log-variance of the latents (B, 2·Z, h, w)."""
        return self.quant_conv(self.encoder(pixels))

    def decode(self, latents: Tensor) -> Tensor:
        return self.decoder(self.post_quant_conv(latents))


class VaeAutoencoder:
    """A frozen VAE as an `Autoencoder`: pixels [-1, 1] ↔ scaled latents, both in fp32 whatever the weights' dtype.

    The decoder of SDXL's VAE overflows in fp16: use bf16 or fp32 (see `upcast` of `from_pretrained`). Autocast around
    a call has no effect. For the effect of batches and tiles on results, see `save_memory`.
    """

    def __init__(self, model: AutoencoderKL):
        config = model.config
        if (config.in_channels, config.out_channels) != (3, 3):
            raise InputError(f"a VAE with {config.in_channels} → {config.out_channels} channels: expected RGB, 3 → 3")
        self.model = model.eval().requires_grad_(False)
        self.latent_channels, self.downsample = config.latent_channels, config.downsample
        self.scale = config.scaling_factor
        self.slices, self.tile = False, None

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        subfolder: str | None = None,
        upcast: bool | None = None,
    ) -> "VaeAutoencoder":
        """Load a VAE as diffusers saves it: `config.json` beside `diffusion_pytorch_model.safetensors` or `.bin`.

        Args:
            source: a folder, a weights file, or a Hub id (owner/name, or owner/name/subfolder) that is cached or
                reachable.
            upcast: run in fp32 even if `dtype` is fp16. The default is the file's `force_upcast`, or True if the file
                does not say. `False` is for files made for fp16.

        Raises:
            InputError: there is no VAE, its config is not supported, or its weights do not fit the config.
        """
        path = find_weights(str(source), subfolder)
        settings = read_settings(path.parent / CONFIG)
        try:
            config = VaeConfig.from_diffusers(settings)
        except InputError as error:
            raise InputError(f"{path.parent / CONFIG}: {error}") from None
        state = read_weights(path)
        if (layers := config.layers_per_block * len(config.block_out_channels)) > len(state):
            raise InputError(
                f"{path.parent / CONFIG}: describes {layers} layers, but {path.name} has {len(state)} tensors"
            )
        with torch.device("meta"):
            model = AutoencoderKL(config)
        _rename_old_attention(model, state, "")
        check_state(model, state, path)
        model.load_state_dict(state, strict=True, assign=True)
        if dtype == torch.float16 and (config.force_upcast if upcast is None else upcast):
            dtype = torch.float32
        return cls(model.to(device=device, dtype=dtype))

    @property
    def dtype(self) -> torch.dtype:
        """The precision in which it computes."""
        return self.model.quant_conv.weight.dtype

    def to(self, device: torch.device | str) -> "VaeAutoencoder":
        self.model.to(device)
        return self

    def save_memory(self, *, slices: bool = True, tile: int | None = 512) -> "VaeAutoencoder":
        """Trade speed for memory from now on.

        Args:
            slices: process one image at a time; the result is the same.
            tile: side in pixels of the tiles into which larger images are cut; they overlap by at least a quarter and
                are blended linearly. None turns tiling off. A tile does not see its surroundings, so colours may shift
                slightly.
        """
        if tile is not None and (tile % self.downsample or tile < 4 * self.downsample):
            raise InputError(
                f"tile: got {tile} px, expected a multiple of {self.downsample}, at least {4 * self.downsample}"
            )
        self.slices, self.tile = slices, tile
        return self

    @torch.no_grad()
    def moments(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Pixels (B, 3, H, W) in [-1, 1] → mean and standard deviation of the scaled latents, each (B, Z, h, w)."""
        _check_input("pixels", pixels, 3, self.downsample)
        mean, log_variance = self._run(self.model.encode, pixels, self.downsample, 1).chunk(2, dim=1)
        return self.scale * mean, self.scale * torch.exp(0.5 * log_variance.clamp(-30, 20))

    def encode(self, pixels: Tensor, noise: Tensor | None = None) -> Tensor:
        """See `Autoencoder.encode`."""
        mean, std = self.moments(pixels)
        if noise is None:
            return mean
        if noise.shape != mean.shape:
            raise InputError(f"noise: got shape {tuple(noise.shape)}, expected {tuple(mean.shape)}")
        return mean + std * noise

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """See `Autoencoder.decode`."""
        _check_input("latents", latents, self.latent_channels, 1)
        return self._run(self.model.decode, latents.float() / self.scale, 1, self.downsample)

    def _run(self, network: Callable[[Tensor], Tensor], x: Tensor, unit_in: int, unit_out: int) -> Tensor:
        """Apply `network` to x in slices and tiles; the units are pixels per latent pixel in its input and output."""
        dtype = self.dtype

        def run(part: Tensor) -> Tensor:
            return network(part.to(dtype)).float()

        def run_tiles(part: Tensor) -> Tensor:
            return blend_tiles(run, part, self.tile // self.downsample, unit_in, unit_out)

        function = run if self.tile is None else run_tiles
        with torch.autocast(x.device.type, enabled=False):  # fp16 would overflow
            return torch.cat([function(image) for image in x.split(1)]) if self.slices else function(x)


def blend_tiles(function: Callable[[Tensor], Tensor], x: Tensor, tile: int, unit_in: int, unit_out: int) -> Tensor:
    """Apply `function` to overlapping tiles of x (B, C, h·unit_in, w·unit_in), each tile × tile in units of h × w.

    A tile's weights rise linearly from its inner edges over a quarter of its side; overlapping weights are normalised
    by their sum.

    Returns:
        (B, C', h·unit_out, w·unit_out), where `function` maps unit_in to unit_out.
    """
    height, width = x.shape[2] // unit_in, x.shape[3] // unit_in
    total = weights = None
    for top, bottom, down in _spans(height, tile, unit_out):
        for left, right, across in _spans(width, tile, unit_out):
            part = function(x[:, :, top * unit_in : bottom * unit_in, left * unit_in : right * unit_in])
            if total is None:
                total = part.new_zeros(*part.shape[:2], height * unit_out, width * unit_out)
                weights = part.new_zeros(total.shape[2:])
            place = (..., slice(top * unit_out, bottom * unit_out), slice(left * unit_out, right * unit_out))
            weight = (down[:, None] * across).to(part)
            total[place] += part * weight
            weights[place] += weight
    return total / weights


def _spans(length: int, tile: int, unit: int) -> list[tuple[int, int, Tensor]]:
    """Start, end and weights ((end - start)·unit of them) of evenly spaced tiles that overlap by at least a quarter."""
    if length <= tile:
        return [(0, length, torch.ones(length * unit))]
    overlap = tile // 4
    last = math.ceil((length - tile) / (tile - overlap))
    ramp = ((torch.arange(tile * unit) + 0.5) / (overlap * unit)).clamp(max=1)
    spans = []
    for i in range(last + 1):
        start = i * (length - tile) // last
        rise = ramp if i > 0 else torch.ones_like(ramp)
        fall = ramp.flip(0) if i < last else torch.ones_like(ramp)
        spans.append((start, start + tile, torch.minimum(rise, fall)))
    return spans


def _check_input(name: str, x: Tensor, channels: int, multiple: int) -> None:
    if x.ndim != 4 or x.shape[1] != channels:
        raise InputError(f"{name}: got shape {tuple(x.shape)}, expected (B, {channels}, H, W)")
    if not x.is_floating_point():
        raise InputError(f"{name}: got {x.dtype}, expected floating point values (pixels in [-1, 1])")
    if not x.shape[2] or not x.shape[3] or x.shape[2] % multiple or x.shape[3] % multiple:
        raise InputError(f"{name}: size {x.shape[2]} × {x.shape[3]}: both sides must be multiples of {multiple}")


_ATTENTION = re.compile(r"(.*mid_block\.attentions\.0\.)(query|key|value|proj_attn|to_[qkv]|to_out\.0)\.(weight|bias)")
_OLD_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def _rename_old_attention(_model: AutoencoderKL, state: dict[str, Tensor], prefix: str, *_) -> None:
    """Rename attention tensors of diffusers before 0.17 (e.g. sd-vae-ft-ema); some files hold them as 1 × 1
    convolutions."""
    for name in [name for name in state if name.startswith(prefix)]:
        if match := _ATTENTION.fullmatch(name):
            tensor, new = state[name], f"{match[1]}{_OLD_NAMES.get(match[2], match[2])}.{match[3]}"
            if new != name and new in state:
                continue  # both names are there: the strict load will say so
            del state[name]
            state[new] = tensor.flatten(1) if tensor.ndim == 4 and tensor.shape[2:] == (1, 1) else tensor
