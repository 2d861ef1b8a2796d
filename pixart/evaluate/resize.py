"""Resizes images for a feature extractor; a score's record names the filter, which changes a FID by more than 1."""

from typing import Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

# clean: antialiased bicubic on floats, per channel (Parmar et al. 2022, "clean-fid"); pil: the same filter with results
# rounded to 8 bits; none: no resizing
Filter = Literal["clean", "pil", "none"]
FILTERS = ("clean", "pil", "none")


def resize(images: np.ndarray, side: int, filter: Filter) -> Tensor:
    """Images (B, H, W, 3) uint8 → (B, 3, side, side) in [0, 255], or (B, 3, H, W) without a filter."""
    if filter == "none" or images.shape[1:3] == (side, side):
        return torch.from_numpy(images.copy()).permute(0, 3, 1, 2).float()
    if filter == "pil":
        small = [np.asarray(Image.fromarray(image).resize((side, side), Image.Resampling.BICUBIC)) for image in images]
        return torch.from_numpy(np.stack(small)).permute(0, 3, 1, 2).float()
    small = [
        [
            np.asarray(Image.fromarray(image[..., c].astype(np.float32)).resize((side, side), Image.Resampling.BICUBIC))
            for c in range(3)
        ]
        for image in images
    ]
    return torch.from_numpy(np.array(small, dtype=np.float32)).clamp(0, 255)
