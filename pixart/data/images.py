"""Pictures: opening them wherever they lie, their sizes, their pixels, and what a scan found of them."""

import struct
import warnings
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import BinaryIO, Protocol, TypeVar

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from pixart.data.buckets import Bucket
from pixart.errors import InputError

IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"}
T = TypeVar("T")
UNREADABLE = (OSError, ValueError, SyntaxError, Image.DecompressionBombError)  # what PIL raises for bad files


class Stored(Protocol):
    """Where the bytes of a picture lie that is no file of its own: small, and fit for pickle."""

    def open(self) -> BinaryIO: ...


Picture = Path | Stored


@dataclass(frozen=True)
class Record:
    """One usable picture: its id (unique in its source), captions, size in pixels after rotation, and bucket."""

    id: str
    picture: Picture
    captions: tuple[str, ...]
    weights: tuple[float, ...]  # how often each caption is to be taken; sums to 1
    height: int
    width: int
    bucket: Bucket

    def choose(self, u: float) -> str:
        """The caption at `u` in [0, 1): each covers as much of it as its weight."""
        return choose(self.captions, self.weights, u)


def choose(options: Sequence[T], weights: Sequence[float], u: float) -> T:
    """The option at `u` in [0, 1): each covers as much of it as its weight, which sum to 1."""
    if all(weight == weights[0] for weight in weights):  # exact, where sums of 1/n would not be
        return options[int(u * len(options))]
    return options[min(bisect_right(list(accumulate(weights)), u), len(options) - 1)]


@dataclass
class ScanReport:
    """What a source holds; `problems` are (id, reason), unreadable images among them."""

    records: list[Record] = field(default_factory=list)
    problems: list[tuple[str, str]] = field(default_factory=list)
    unreadable: int = 0
    source: str = ""  # what the source was taken for, and its captions

    def describe(self) -> str:
        """A few lines for a person: images per bucket, dropped ones by reason, the first names."""
        counts = Counter((record.bucket.height, record.bucket.width) for record in self.records)
        lines = [self.source] if self.source else []
        lines.append(
            f"{len(self.records)} images in {len(counts)} bucket{'s' * (len(counts) != 1)} (height × width: images)"
        )
        sizes = [f"{height}×{width}: {count}" for (height, width), count in sorted(counts.items())]
        lines += ["  " + ", ".join(sizes[i : i + 6]) for i in range(0, len(sizes), 6)]
        small = sum(r.height < r.bucket.height or r.width < r.bucket.width for r in self.records)
        if small:
            lines.append(f"  {small} are smaller than their bucket and are enlarged")
        if self.problems:
            lines.append(f"{len(self.problems)} left out, {self.unreadable} of them unreadable:")
            lines += [f"  {name}: {reason}" for name, reason in self.problems[:20]]
            if len(self.problems) > 20:
                lines.append(f"  … and {len(self.problems) - 20} more")
        return "\n".join(lines)


def check_unreadable(problems: list[tuple[str, str]], unreadable: int, total: int) -> None:
    """A few bad files are skipped; more than 1 % (and more than one) are a damaged data set, and stop the run."""
    if unreadable > max(1, 0.01 * total):
        names = "\n".join(f"  {name}: {reason}" for name, reason in problems)
        raise InputError(
            f"{unreadable} of {total} images are unreadable, more than 1 %; remove or repair them:\n{names}"
        )


@contextmanager
def open_image(picture: Picture) -> Iterator[Image.Image]:
    """The picture, its header read.

    Raises:
        UNREADABLE: one of these.
    """
    if isinstance(picture, Path):
        with Image.open(picture) as image:
            yield image
        return
    with picture.open() as file:
        try:
            image = Image.open(file)
        except UnidentifiedImageError:  # its text names an object in memory
            raise ValueError("cannot identify it as an image") from None
        with image:
            yield image


def load_image(picture: Picture, bucket: Bucket, *, crop: tuple[float, float] = (0.5, 0.5)) -> np.ndarray:
    """Read an image, resize it to cover its bucket and crop → uint8 (height, width, 3).

    CMYK, palette and 16-bit images become RGB, transparency becomes white, of an animation the first frame is taken.
    `crop` is where the crop lies in what is left over, 0 (top, left) … 1 (bottom, right).

    Raises:
        UNREADABLE: one of these, for a file that is no image, or truncated.
    """
    with open_image(picture) as image:
        image = to_rgb(ImageOps.exif_transpose(image))
    return np.asarray(cover_and_crop(image, bucket.height, bucket.width, crop=crop))


def cover_and_crop(
    image: Image.Image, height: int, width: int, *, crop: tuple[float, float] = (0.5, 0.5)
) -> Image.Image:
    """An image resized to cover height × width, and cropped to it; `crop` as `load_image`'s."""
    scale = max(height / image.height, width / image.width)
    size = max(round(image.width * scale), width), max(round(image.height * scale), height)
    if size != image.size:
        image = image.resize(size, Image.Resampling.BICUBIC)
    top, left = round((size[1] - height) * crop[0]), round((size[0] - width) * crop[1])
    return image.crop((left, top, left + width, top + height))


def to_rgb(image: Image.Image) -> Image.Image:
    """Any mode → RGB on white."""
    if image.mode.startswith("I;16") or image.mode == "I" or image.mode == "F":
        values = np.asarray(image, dtype=np.float64)
        full = 65535 if image.mode != "F" or values.max() > 1 else 1  # PIL's own conversion clips 16 bits at 255
        image = Image.fromarray((values.clip(0, full) * (255 / full)).round().astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def read_size(picture: Picture) -> tuple[int, int, bool]:
    """Height and width as `load_image` will find them, and whether EXIF turned them.

    Raises:
        UNREADABLE: one of these.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        try:
            with open_image(picture) as image:
                if image.format == "TIFF":  # PIL turns these itself, at the latest when it loads them
                    image.load()
                # PNG's own getexif would decode the pixels, to look for EXIF behind them
                exif = Image.Image.getexif(image)
                if image.format == "PNG" and "exif" not in image.info and (data := _find_png_exif(picture)):
                    exif.load(data)
                width, height = image.size
        except Image.DecompressionBombWarning as warning:
            raise ValueError(str(warning)) from None
    turned = exif.get(0x0112, 1) in (5, 6, 7, 8)  # EXIF orientation
    return (width, height, True) if turned else (height, width, False)


def _find_png_exif(picture: Picture) -> bytes:
    """The eXIf chunk of a PNG; empty if there is none. Steps over the others."""
    with open(picture, "rb") if isinstance(picture, Path) else picture.open() as file:
        file.seek(8)
        while len(head := file.read(8)) == 8:
            length, kind = struct.unpack(">I4s", head)
            if kind == b"eXIf":
                return b"Exif\0\0" + file.read(length)
            file.seek(length + 4, 1)
    return b""
