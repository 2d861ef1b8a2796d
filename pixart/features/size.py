"""How large a feature store becomes."""

import torch

from pixart.data.config import DataConfig
from pixart.encoders.autoencoder import AutoencoderConfig
from pixart.features.extraction import ExtractConfig


def store_bytes(
    images: int,
    data: DataConfig,
    vae: AutoencoderConfig,
    extract: ExtractConfig,
    *,
    tokens: int,
    width: int,
    captions: int = 1,
) -> int:
    """Bytes of the latents and caption states of a store; ids, texts and sizes add some tens of bytes an image.

    Args:
        tokens: of a caption on average, padding left out.
        width: of the text encoder's states.
        captions: distinct ones for each image.
    """
    side = data.resolution // vae.downsample  # buckets have about the area of the square one
    numbers = 2 * vae.latent_channels * side**2 * (1 + extract.mirrored)  # mean and standard deviation
    states = captions * tokens * width
    return images * (
        numbers * getattr(torch, extract.latent_dtype).itemsize + states * getattr(torch, data.text_dtype).itemsize
    )
