"""Autoencoders, between pixels and what the network denoises: pixels in [-1, 1] ↔ scaled latents."""

import math
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from pixart.config import setting
from pixart.encoders.vae import VaeAutoencoder, VaeConfig
from pixart.errors import InputError
from pixart.ranges import check_numbers


@dataclass(frozen=True)
class AutoencoderConfig:
    """The autoencoder of a model's latents; stored with every model.

    Its properties are known without reading weights; `load_autoencoder` reads them.
    """

    kind: Literal["identity", "kl"] = "identity"  # "kl" is the VAE of SD (PixArt-α) or SDXL (PixArt-Σ)
    # the VAE: a folder, a weights file, or a Hub id (owner/name or owner/name/subfolder)
    source: str = setting("", path=True)
    scale: float | None = setting(None, above=0)  # the VAE's scaling factor; if its files say another, they are refused

    def __post_init__(self):
        check_numbers(self, "vae")
        if self.kind == "identity" and (self.source or self.scale is not None):
            raise InputError("vae.source and vae.scale need vae.kind kl; set that, or leave them out")
        if self.kind == "kl" and not self.source:
            raise InputError("vae.source: expected the VAE's folder, weights file or Hub id with vae.kind kl")

    @property
    def latent_channels(self) -> int:
        return _NUMBERS[self.kind].latent_channels

    @property
    def downsample(self) -> int:
        """Pixels per latent pixel along each side."""
        return _NUMBERS[self.kind].downsample


class Autoencoder(Protocol):
    """The interface of all autoencoders."""

    latent_channels: int
    downsample: int  # pixels per latent pixel along each side
    scale: float  # scaled latents = scale · the VAE's own latents

    def encode(self, pixels: Tensor, noise: Tensor | None = None) -> Tensor:
        """Pixels (B, 3, H, W) in [-1, 1] → scaled latents (B, C, H/f, W/f): a sample of the posterior, drawn with the
        standard normal `noise` of the latents' shape, or without it the posterior's mean."""

    def moments(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Pixels → mean and standard deviation of the posterior of the scaled latents, each (B, C, H/f, W/f)."""

    def decode(self, latents: Tensor) -> Tensor:
        """Scaled latents → pixels (B, 3, H, W), nominally in [-1, 1], not clipped."""

    def to(self, device: torch.device | str) -> "Autoencoder":
        """Move it, in place."""

    def save_memory(self) -> "Autoencoder":
        """Trade speed for memory from now on: process images one by one, and large ones in tiles."""


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


# kind → an object with its `latent_channels` and `downsample`, without weights
_NUMBERS = {"identity": IdentityAutoencoder, "kl": VaeConfig()}


def load_autoencoder(
    config: AutoencoderConfig, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> Autoencoder:
    """Load the autoencoder with its weights; if only its properties are needed, the config has them.

    Raises:
        InputError: there is no VAE, or it is not the one that the config describes.
    """
    if config.kind == "identity":
        return IdentityAutoencoder()
    vae = VaeAutoencoder.from_pretrained(config.source, dtype=dtype, device=device)
    if config.scale is not None and not math.isclose(vae.scale, config.scale, rel_tol=1e-6):
        raise InputError(
            f"vae.source {config.source} has scaling factor {vae.scale}, but vae.scale is {config.scale}: "
            "the latents come from another VAE"
        )
    if (vae.latent_channels, vae.downsample) != (config.latent_channels, config.downsample):
        raise InputError(
            f"vae.source {config.source} has {vae.latent_channels} channels at 1/{vae.downsample} of the size, "
            f"expected {config.latent_channels} at 1/{config.downsample}"
        )
    return vae
