"""Images: opening them wherever they are stored, their sizes, their pixels, and the report of a scan."""

import struct
from bisect import bisect_right
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path, PurePath
from typing import TypeVar

import numpy as np
from PIL import Image, ImageOps

from pixart.data.buckets import Bucket
from pixart.data.decoding import MAX_PIXELS, Picture, decoding, open_image, open_picture
from pixart.errors import InputError

USUAL_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"}
# suffixes by which images are found; the format itself is recognised by content
IMAGE_SUFFIXES = USUAL_SUFFIXES | {".jfif", ".jpe", ".avif", ".jp2", ".heic", ".heif", ".jxl"}
T = TypeVar("T")


@dataclass(frozen=True)
class Record:
    """One usable image: its id (unique in its source), captions, size in pixels after rotation, and bucket."""

    id: str
    picture: Picture
    captions: tuple[str, ...]
    weights: tuple[float, ...]  # probability of each caption; sums to 1
    height: int
    width: int
    bucket: Bucket
    length: int = 0  # size of its file in bytes
    loss_weight: float = 1.0  # of its loss in training

    def choose(self, u: float) -> str:
        """The caption at `u` in [0, 1), of which each covers a share equal to its weight."""
        return choose(self.captions, self.weights, u)


def choose(options: Sequence[T], weights: Sequence[float], u: float) -> T:
    """The option at `u` in [0, 1), of which each covers a share equal to its weight; the weights sum to 1."""
    if all(weight == weights[0] for weight in weights):  # exact, unlike sums of 1/n
        return options[int(u * len(options))]
    return options[min(bisect_right(list(accumulate(weights)), u), len(options) - 1)]


@dataclass
class ScanReport:
    """What a source holds; `problems` are (id, reason), including unreadable images."""

    records: list[Record] = field(default_factory=list)
    problems: list[tuple[str, str]] = field(default_factory=list)
    unreadable: int = 0
    source: str = ""  # the recognised format of the source, and its captions
    notes: list[str] = field(default_factory=list)  # what was read in another way than it was written

    def describe(self) -> str:
        """The report as a few lines of text: images per bucket, and the first of those left out, with reasons."""
        counts = Counter((record.bucket.height, record.bucket.width) for record in self.records)
        lines = [self.source] if self.source else []
        lines.append(
            f"{len(self.records)} images in {len(counts)} bucket{'s' * (len(counts) != 1)} (height × width: images)"
        )
        sizes = [f"{height}×{width}: {count}" for (height, width), count in sorted(counts.items())]
        lines += ["  " + ", ".join(sizes[i : i + 6]) for i in range(0, len(sizes), 6)]
        suffixes = {PurePath(record.id).suffix.lower() for record in self.records} & IMAGE_SUFFIXES
        if suffixes - USUAL_SUFFIXES:
            lines.append(f"  with the suffixes {', '.join(sorted(suffixes))}")
        lines += [f"  {note}" for note in self.notes]
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
    """Stop the run if more than 1 % of the images (and more than one) or their captions are unreadable, i.e. if the
    data set is damaged; fewer are skipped."""
    if unreadable > max(1, 0.01 * total):
        names = "\n".join(f"  {name}: {reason}" for name, reason in problems)
        raise InputError(
            f"{unreadable} of {total} images are unreadable, more than 1 %; remove or repair them:\n{names}"
        )


def load_image(
    picture: Picture, bucket: Bucket, *, crop: tuple[float, float] = (0.5, 0.5), max_pixels: int = MAX_PIXELS
) -> np.ndarray:
    """Read an image, resize it to cover its bucket and crop → uint8 (height, width, 3).

    CMYK, palette, 16-bit and float images become RGB, transparency becomes white, and of an animation the first frame
    is used. `crop` is the position of the crop, from 0 (top, left) to 1 (bottom, right).

    Raises:
        UnreadableImage: it is not an image, is truncated, or has more than `max_pixels`.
    """
    with open_image(picture, max_pixels) as image:
        image = to_rgb(ImageOps.exif_transpose(image))
        return np.asarray(cover_and_crop(image, bucket.height, bucket.width, crop=crop))


def load_record(record: Record, *, crop: tuple[float, float] = (0.5, 0.5)) -> np.ndarray:
    """`load_image` for a record, whose size the scan has already accepted."""
    pixels = max(MAX_PIXELS, record.height * record.width)
    return load_image(record.picture, record.bucket, crop=crop, max_pixels=pixels)


def cover_and_crop(
    image: Image.Image, height: int, width: int, *, crop: tuple[float, float] = (0.5, 0.5)
) -> Image.Image:
    """An image resized to cover height × width, and cropped to it; `crop` as in `load_image`."""
    scale = max(height / image.height, width / image.width)
    size = max(round(image.width * scale), width), max(round(image.height * scale), height)
    if size != image.size:
        image = image.resize(size, Image.Resampling.BICUBIC)
    top, left = round((size[1] - height) * crop[0]), round((size[0] - width) * crop[1])
    return image.crop((left, top, left + width, top + height))


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert any mode to RGB on white.

    Raises:
        ValueError: float or 32-bit values whose range does not show which value is white.
    """
    if image.mode.startswith("I;16") or image.mode in ("I", "F"):  # PIL's own conversion clips them at 255
        values = np.asarray(image, dtype=np.float64)
        full = 65535.0 if image.mode.startswith("I;16") else _white(values, image.mode)
        image = Image.fromarray((values * (255 / full)).round().astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def _white(values: np.ndarray, mode: str) -> float:
    """The value of white among float ("F") or 32-bit ("I") values, which their format does not define: the upper end of
    the smallest common range that contains all values."""
    low, high = values.min(), values.max()
    for white in (1.0, 255.0, 65535.0) if mode == "F" else (255.0, 65535.0):
        if low >= 0 and high <= white:
            return white
    raise ValueError(f"values from {low:g} to {high:g}; expected 0 to 1, to 255 or to 65535, to know what is white")


def read_size(picture: Picture, max_pixels: int = MAX_PIXELS) -> tuple[int, int, bool]:
    """Height and width as `load_image` sees them, and whether EXIF rotation swapped them.

    Raises:
        UnreadableImage: it is not an image, is damaged before its pixels, or has more than `max_pixels`.
    """
    with open_image(picture, max_pixels) as image:
        if image.format == "TIFF":  # PIL applies the rotation itself, at the latest when it loads them
            image.load()
        # the getexif of PNG images would decode the pixels to look for EXIF after them
        exif = Image.Image.getexif(image)
        if image.format == "PNG" and "exif" not in image.info and (data := _find_png_exif(picture)):
            exif.load(data)
        width, height = image.size
        turned = exif.get(0x0112, 1) in (5, 6, 7, 8)  # EXIF orientation
    return (width, height, True) if turned else (height, width, False)


def count_bytes(picture: Picture) -> int:
    """The size of an image's file in bytes, by which most changes can be noticed without reading it.

    Raises:
        UnreadableImage: it is missing or not a file.
    """
    if isinstance(picture, Path):
        with decoding():
            return picture.stat().st_size
    with open_picture(picture) as file:
        return file.seek(0, 2)


def _find_png_exif(picture: Picture) -> bytes:
    """The eXIf chunk of a PNG, empty if there is none; other chunks are skipped without reading them."""
    with open_picture(picture) as file:
        file.seek(8)
        while len(head := file.read(8)) == 8:
            length, kind = struct.unpack(">I4s", head)
            if kind == b"eXIf":
                return b"Exif\0\0" + file.read(length)
            file.seek(length + 4, 1)
    return b""
