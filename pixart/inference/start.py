"""Images, masks and latents from which sampling starts: read, checked, fitted to a size, encoded, and composited with
the result."""

import hashlib
import warnings
from collections import OrderedDict
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor

from pixart.checkpoint import ModelCard
from pixart.data.buckets import nearest_bucket
from pixart.data.decoding import UnreadableImage, decoding, open_image
from pixart.data.images import cover_and_crop, to_rgb
from pixart.diffusion.sampling import SampleConfig, visited_times
from pixart.diffusion.schedule import Schedule
from pixart.encoders.autoencoder import Autoencoder
from pixart.errors import InputError
from pixart.inference.latents import Size, Start, choose_size, official_sizes, start_times
from pixart.inference.request import ImageSource, Request, strength_of

KEPT = 4  # number of images kept, so that they need not be read and encoded again for every request


@dataclass
class Source:
    """What a request starts from, in the generated size."""

    pixels: Tensor | None  # (3, H, W) in [-1, 1]; None for latents
    mask: Tensor | None  # (1, H, W), 1 = redrawn
    digest: str  # of the pixels or latents
    mask_digest: str | None
    latents: Tensor | None = None  # (C, h, w), clean and scaled; set when encoded


def check_start(request: Request, config: SampleConfig, schedule: Schedule) -> None:
    """Refuse a start that the sampler does not support; no file is opened."""
    strength = strength_of(request)
    if strength is not None:
        start_times(config, schedule, strength)


def count_steps(request: Request, config: SampleConfig, schedule: Schedule) -> int:
    """Number of steps of a request with a resolved config. Raises as `check_start` does."""
    check_start(request, config, schedule)
    strength = strength_of(request)
    return len(visited_times(config, schedule) if strength is None else start_times(config, schedule, strength))


class Sources:
    """The starts of a stream's requests; the last few are kept, so that an image shared by many is read once."""

    def __init__(self, card: ModelCard, autoencoder: Autoencoder):
        self.card, self.autoencoder = card, autoencoder
        self._kept: OrderedDict[tuple, tuple[Request, tuple[Size, Size], Source]] = OrderedDict()

    def read(self, request: Request) -> tuple[tuple[Size, Size], Source | None]:
        """The size to generate and the size to return, in pixels, and what to start from, if anything.

        Raises:
            InputError: it is not an image, has a size that the model cannot take, or its mask has another size.
        """
        asked = {name: getattr(request, name) for name in ("height", "width", "aspect_ratio", "sizes")}
        if strength_of(request) is None:
            return choose_size(self.card, **asked), None
        given = (request.image, request.latents, request.mask)
        key = (*(str(x) if isinstance(x, (str, Path)) else id(x) for x in given), *asked.values())
        if key not in self._kept:  # the request is stored, too, so that the ids of its objects stay valid
            self._kept[key] = request, *self._read(request, asked)
        self._kept.move_to_end(key)
        while len(self._kept) > KEPT:
            self._kept.popitem(last=False)
        return self._kept[key][1:]

    def _read(self, request: Request, asked: dict) -> tuple[tuple[Size, Size], Source]:
        mask = None if request.mask is None else _read_mask(request.mask)
        if request.latents is not None:
            latents = _check_latents(request.latents, self.card)
            own = tuple(side * self.card.vae.downsample for side in latents.shape[1:])
            sizes = _choose(self.card, own, asked)
            if sizes[0] != own:
                raise InputError(f"latents: {_name(own)} cannot be resized to {_name(sizes[0])}; leave the size out")
            mask = _fit(mask, own, own, "mask")
            return sizes, Source(None, mask, _digest(latents), _digest(mask), latents)
        image = _read_image(request.image)
        own = _size(image)
        sizes = _choose(self.card, own, asked)
        mask, pixels = _fit(mask, own, sizes[0], "mask"), _fit(image, own, sizes[0], "image")
        return sizes, Source(pixels, mask, _digest(pixels), _digest(mask))

    @torch.no_grad()
    def start(self, sources: Sequence[Source], strength: float, device: torch.device) -> Start:
        """Sources of one size → the `Start` for `sample_latents`, encoded to the posterior's mean."""
        for source in sources:  # one at a time, so that no image depends on the others
            if source.latents is None:
                source.latents = self.autoencoder.encode(source.pixels[None].to(device))[0]
        latents = torch.stack([source.latents.to(device).float() for source in sources])
        if sources[0].mask is None:
            return Start(latents, strength)
        masks = torch.stack([source.mask for source in sources])
        return Start(latents, strength, F.interpolate((masks >= 0.5).float(), latents.shape[2:], mode="nearest"))


def put_back(sources: Sequence[Source], pixels: Tensor) -> Tensor:
    """Drawn pixels (B, 3, H, W), replaced by the originals where the masks keep them (exactly, where a mask is 0)."""
    if sources[0].mask is None or sources[0].pixels is None:
        return pixels
    originals, masks = (torch.stack(x).to(pixels) for x in zip(*((s.pixels, s.mask) for s in sources), strict=True))
    return torch.lerp(originals, pixels, masks.expand_as(pixels))


def _choose(card: ModelCard, own: Size, asked: dict) -> tuple[Size, Size]:
    if any(asked[name] is not None for name in ("height", "width", "aspect_ratio")):
        return choose_size(card, **asked)
    if asked["sizes"] == "official":
        bucket = nearest_bucket(official_sizes(card), *own)
        return ((bucket.height, bucket.width),) * 2
    return choose_size(card, height=own[0], width=own[1], sizes=asked["sizes"])


def _read_image(given: ImageSource) -> Image.Image | Tensor:
    """RGB on white, with EXIF rotation applied; a tensor is unchanged."""
    if isinstance(given, Tensor):
        if given.ndim != 3 or len(given) != 3 or not given.is_floating_point():
            raise InputError(f"image: got a tensor of {_describe(given)}, expected pixels (3, H, W) in [-1, 1]")
        return given.detach().float().cpu()
    with _open(given, "image") as image:
        if _is_transparent(image):
            warnings.warn("image: its transparent parts become white", stacklevel=2)
        return to_rgb(image)


def _read_mask(given: ImageSource) -> Image.Image | Tensor:
    """8-bit grey with EXIF rotation applied; or a tensor (1, H, W)."""
    if isinstance(given, Tensor):
        mask = given[None] if given.ndim == 2 else given
        if mask.ndim != 3 or len(mask) != 1:
            raise InputError(f"mask: got a tensor of {_describe(given)}, expected (H, W) or (1, H, W) in [0, 1]")
        mask = mask.detach().float().cpu()
        if not (mask.min() >= 0 and mask.max() <= 1):
            raise InputError(f"mask: got values from {mask.min():g} to {mask.max():g}, expected 0 to 1")
        return mask
    with _open(given, "mask") as image:
        return to_rgb(image).convert("L")


@contextmanager
def _open(given: ImageSource, name: str):
    """A context with the image, loaded and with EXIF rotation applied."""
    if not isinstance(given, (Image.Image, str, Path)):
        raise InputError(f"{name}: got {type(given).__name__}, expected a PIL image, a file or a tensor")
    what = name if isinstance(given, Image.Image) else f"{name} {str(given)[:300]}"
    try:
        if isinstance(given, Image.Image):
            with decoding():
                yield ImageOps.exif_transpose(given)
        else:
            with open_image(Path(given)) as image:
                yield ImageOps.exif_transpose(image)
    except UnreadableImage as error:
        reason = getattr(error.__cause__, "strerror", None) or error
        raise InputError(f"{what}: cannot be read as an image ({reason})") from None


def _is_transparent(image: Image.Image) -> bool:
    if image.mode not in ("RGBA", "LA", "PA") and "transparency" not in image.info:
        return False
    return image.convert("RGBA").getextrema()[3][0] < 255


def _fit(given: Image.Image | Tensor | None, own: Size, size: Size, name: str) -> Tensor | None:
    """An image → pixels (3, *size) in [-1, 1], a mask → (1, *size) in [0, 1]."""
    if given is None:
        return None
    if _size(given) != own:
        raise InputError(f"mask: it is {_name(_size(given))}, the image {_name(own)}; expected the same size")
    if isinstance(given, Tensor):
        if own != size:
            raise InputError(f"{name}: a tensor of {_name(own)} is not resized to {_name(size)}; give a PIL image")
        return given
    array = torch.from_numpy(np.array(cover_and_crop(given, *size)))
    return array[None].float() / 255 if given.mode == "L" else array.permute(2, 0, 1).float() / 127.5 - 1


def _check_latents(latents: Tensor, card: ModelCard) -> Tensor:
    channels = card.model.in_channels
    if not isinstance(latents, Tensor) or latents.ndim != 3 or len(latents) != channels:
        got = _describe(latents) if isinstance(latents, Tensor) else type(latents).__name__
        raise InputError(f"latents: got {got}, expected a tensor ({channels}, h, w) for each image")
    return latents.detach().float()


def _size(image: Image.Image | Tensor) -> Size:
    return tuple(image.shape[1:]) if isinstance(image, Tensor) else (image.height, image.width)


def _name(size: Size) -> str:
    return f"{size[0]} × {size[1]} px"


def _describe(tensor: Tensor) -> str:
    return f"shape {tuple(tensor.shape)} and {str(tensor.dtype).removeprefix('torch.')}"


def _digest(tensor: Tensor | None) -> str | None:
    if tensor is None:
        return None
    values = tensor.cpu().contiguous().numpy()
    return hashlib.blake2b(f"{values.shape}".encode() + values.tobytes(), digest_size=16).hexdigest()
