"""Between pixels and what the network denoises. Every autoencoder speaks pixels [-1, 1] ↔ scaled latents."""

import math
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from pixart.config import setting
from pixart.encoders.vae import VaeAutoencoder, VaeConfig
from pixart.errors import InputError


@dataclass(frozen=True)
class AutoencoderConfig:
    """Which autoencoder a model's latents come from; stored with every model.

    Its numbers cost nothing to ask for; `load_autoencoder` reads the weights.
    """

    kind: Literal["identity", "kl"] = "identity"  # "kl" is the VAE of SD (PixArt-α) or SDXL (PixArt-Σ)
    # of the VAE: a folder, a weights file, or a Hub id (owner/name or owner/name/subfolder)
    source: str = setting("", path=True)
    scale: float | None = None  # the VAE's scaling factor; another one in its files is refused

    def __post_init__(self):
        if self.kind == "identity" and (self.source or self.scale is not None):
            raise InputError("vae.source and vae.scale belong to vae.kind kl; set it, or leave them out")
        if self.kind == "kl" and not self.source:
            raise InputError("vae.source: expected the VAE's folder, weights file or Hub id with vae.kind kl")
        if self.scale is not None and not self.scale > 0:
            raise InputError(f"vae.scale: got {self.scale}, expected a positive number")

    @property
    def latent_channels(self) -> int:
        return _NUMBERS[self.kind].latent_channels

    @property
    def downsample(self) -> int:
        """Pixels of a latent's side."""
        return _NUMBERS[self.kind].downsample


class Autoencoder(Protocol):
    """The interface; a property of the class, not of a batch, unless said."""

    latent_channels: int
    downsample: int  # pixels of a latent's side
    scale: float  # scaled latents over the network's own

    def encode(self, pixels: Tensor, noise: Tensor | None = None) -> Tensor:
        """Pixels (B, 3, H, W) in [-1, 1] → scaled latents (B, C, H/f, W/f): a sample of the posterior by standard
        normal `noise` of the latents' shape, or its mean without."""

    def moments(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Pixels → mean and standard deviation of the posterior of the scaled latents, each (B, C, H/f, W/f)."""

    def decode(self, latents: Tensor) -> Tensor:
        """Scaled latents → pixels (B, 3, H, W), nominally in [-1, 1], not clipped."""

    def to(self, device: torch.device | str) -> "Autoencoder":
        """Move it, in place."""

    def save_memory(self) -> "Autoencoder":
        """Trade speed for memory from now on: pictures one by one, large ones in tiles."""


class IdentityAutoencoder:
    """For models that denoise pixels: latents are the pixels."""

    latent_channels = 3
    downsample = 1
    scale = 1.0

    def encode(self, pixels: Tensor, noise: Tensor | None = None) -> Tensor:
        return pixels

    def moments(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        return pixels, torch.zeros_like(pixels)

    def decode(self, latents: Tensor) -> Tensor:
        return latents

    def to(self, device: torch.device | str) -> "IdentityAutoencoder":
        return self

    def save_memory(self) -> "IdentityAutoencoder":
        return self


# what has a kind's `latent_channels` and `downsample` without its weights
_NUMBERS = {"identity": IdentityAutoencoder, "kl": VaeConfig()}


def load_autoencoder(
    config: AutoencoderConfig, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> Autoencoder:
    """The autoencoder itself, its weights read; for its numbers alone ask the config.

    Raises:
        InputError: no VAE there, or not the one that the config means.
    """
    if config.kind == "identity":
        return IdentityAutoencoder()
    vae = VaeAutoencoder.from_pretrained(config.source, dtype=dtype, device=device)
    if config.scale is not None and not math.isclose(vae.scale, config.scale, rel_tol=1e-6):
        raise InputError(
            f"vae.source {config.source} has scaling factor {vae.scale}, vae.scale is {config.scale}: "
            "these latents come from another VAE"
        )
    if (vae.latent_channels, vae.downsample) != (config.latent_channels, config.downsample):
        raise InputError(
            f"vae.source {config.source} has {vae.latent_channels} channels at 1/{vae.downsample} of the size, "
            f"expected {config.latent_channels} at 1/{config.downsample}"
        )
    return vae
