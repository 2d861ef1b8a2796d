"""Between pixels and what the network denoises. Every autoencoder speaks pixels [-1, 1] ↔ scaled latents."""

from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor


@dataclass(frozen=True)
class AutoencoderConfig:
    """Which autoencoder a model's latents come from; stored with every model."""

    kind: Literal["identity"] = "identity"


class Autoencoder(Protocol):
    """The interface; a property of the class, not of a batch, unless said."""

    latent_channels: int
    downsample: int  # pixels of a latent's side

    def encode(self, pixels: Tensor, noise: Tensor | None = None) -> Tensor:
        """Pixels (B, 3, H, W) in [-1, 1] → scaled latents (B, C, H/f, W/f): a sample of the posterior by standard
        normal `noise` of the latents' shape, or its mean without."""

    def decode(self, latents: Tensor) -> Tensor:
        """Scaled latents → pixels (B, 3, H, W), nominally in [-1, 1], not clipped."""


class IdentityAutoencoder:
    """For models that denoise pixels: latents are the pixels."""

    latent_channels = 3
    downsample = 1

    def encode(self, pixels: Tensor, noise: Tensor | None = None) -> Tensor:
        return pixels

    def decode(self, latents: Tensor) -> Tensor:
        return latents

    def to(self, device: torch.device | str) -> "IdentityAutoencoder":
        return self


def load_autoencoder(config: AutoencoderConfig) -> Autoencoder:
    return {"identity": IdentityAutoencoder}[config.kind]()
