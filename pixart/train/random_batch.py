"""Batches of random numbers in the shapes of a run's own, where a step is measured or simulated without its data."""

import torch
from torch import Tensor

from pixart.data.buckets import Bucket
from pixart.data.samples import Batch
from pixart.seeds import Draw
from pixart.train.config import TrainConfig


def random_batch(
    config: TrainConfig, count: int | None = None, bucket: Bucket | None = None, *, from_pixels: bool | None = None
) -> Batch:
    """A random batch, with captions of different lengths, padded to the model's.

    Arrays that `data.conditions` and `data.targets` name are left out, since only the data have their shapes.

    Args:
        count: number of images; by default all of a step's.
        bucket: their size; by default the square one's.
        from_pixels: whether it holds pixels, which the autoencoder encodes; by default only if that is the identity.
    """
    count = config.train.batch_size if count is None else count
    side, length, factor = config.data.resolution, config.text.length, config.vae.downsample
    height, width = (side, side) if bucket is None else (bucket.height, bucket.width)
    latent = config.vae.latent_channels, height // factor, width // factor
    from_pixels = config.vae.kind == "identity" if from_pixels is None else from_pixels
    g = torch.Generator().manual_seed(0)

    def drawn(wanted: dict[str, str | Draw]) -> dict[str, Tensor]:
        patch = config.model.patch_size
        shapes = {"sample": (), "token": (latent[1] // patch * (latent[2] // patch),), "latent": latent}
        kinds = {"uniform": torch.rand, "normal": torch.randn}
        draws = {name: draw for name, draw in wanted.items() if isinstance(draw, Draw)}
        return {name: kinds[draw.kind](count, *shapes[draw.shape], generator=g) for name, draw in draws.items()}

    lengths = torch.randint(3, length + 1, (count, 1), generator=g) if length > 3 else torch.full((count, 1), length)
    extras = config.data_spec.extras
    return Batch(
        pixels=torch.rand(count, 3, height, width, generator=g) * 2 - 1 if from_pixels else None,
        latents=None if from_pixels else torch.randn(count, *latent, generator=g),
        noise=torch.randn(count, *latent, generator=g),
        posterior_noise=torch.randn(count, *latent, generator=g),
        time=torch.rand(count, generator=g),
        caption=torch.randn(count, length, config.model.caption_channels, generator=g),
        caption_mask=torch.arange(length) < lengths,
        drop=torch.rand(count, generator=g),
        size=torch.tensor([[float(height), float(width)]]).repeat(count, 1),
        aspect_ratio=torch.full((count,), 1.0 if bucket is None else bucket.ratio),
        weight=torch.ones(count),
        ids=[str(i) for i in range(count)],
        problems=[],
        conditions=drawn(dict(extras.conditions)),
        draws=drawn(dict(extras.draws)),
    )
