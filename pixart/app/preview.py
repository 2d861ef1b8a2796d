"""Previews of what sampling predicts: a linear map from latents to colours, fitted to the autoencoder once."""

import base64
import io

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from pixart.encoders.autoencoder import Autoencoder
from pixart.inference.latents import to_images

FITTED = 12  # number of small random images of latents on which the map is fitted
GRID, CELLS = 8, 3  # their side in latents, and that of the random grid of colours that they are interpolated from
SIDE = 192  # shorter side of a preview, in pixels


class Preview:
    """A linear map of scaled latents to colours: the least-squares fit to the autoencoder's decoder, whose output is
    averaged over each latent's pixels. Models of pixels need none."""

    def __init__(self, autoencoder: Autoencoder, device: torch.device | str = "cpu"):
        self.matrix = None if autoencoder.downsample == 1 else fit(autoencoder, device)  # (C + 1, 3)

    def pixels(self, x0: Tensor) -> Tensor:
        """Scaled latents (B, C, h, w) → pixels (B, 3, h, w) in [-1, 1]."""
        x0 = x0.detach().float().cpu()
        if self.matrix is not None:
            x0 = torch.einsum("bchw,cd->bdhw", x0, self.matrix[:-1]) + self.matrix[-1][:, None, None]
        return x0.clamp(-1, 1)

    def image(self, x0: Tensor) -> Image.Image:
        """One image of all previews in a row, enlarged or reduced by a whole factor."""
        if (factor := min(x0.shape[2:]) // SIDE) > 1:  # of many pixels: converting and compressing all takes longer
            x0 = F.avg_pool2d(x0.detach().float(), factor)
        pixels = self.pixels(x0)
        row = F.pad(pixels, (0, 1), value=1.0).permute(1, 2, 0, 3).flatten(2)[None, :, :, :-1]
        image = to_images(row)[0]
        factor = max(SIDE // min(x0.shape[2:]), 1)
        return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)


@torch.no_grad()
def fit(autoencoder: Autoencoder, device: torch.device | str) -> Tensor:
    """(C + 1, 3): colours of latents, the last row is a constant. Costs a decode of some 200 × 200 pixels."""
    generator = torch.Generator().manual_seed(0)
    channels, cell = autoencoder.latent_channels, autoencoder.downsample
    grid = torch.randn(FITTED, channels, CELLS, CELLS, generator=generator)
    latents = F.interpolate(grid, (GRID, GRID), mode="bilinear", align_corners=True)
    colours = F.avg_pool2d(autoencoder.decode(latents.to(device)).float().cpu(), cell)
    rows = torch.cat([latents, torch.ones(FITTED, 1, GRID, GRID)], 1).permute(0, 2, 3, 1).flatten(0, 2)
    return torch.linalg.lstsq(rows, colours.permute(0, 2, 3, 1).flatten(0, 2)).solution


def data_url(image: Image.Image, kind: str = "PNG") -> str:
    """An image within a page, so that no file is written."""
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(buffer.getvalue()).decode()}"
