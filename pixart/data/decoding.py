"""Opening images: which formats, up to how many pixels; every error of a decoder becomes an `UnreadableImage`."""

import threading
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import lru_cache
from importlib import import_module
from pathlib import Path
from typing import BinaryIO, Protocol

from PIL import Image

from pixart.errors import InputError
from pixart.files import open_file

MAX_PIXELS = 1 << 28  # 268 megapixels (the largest cameras have 200); `data.max_pixels` sets another limit
# Pillow's names of the formats that are read; it has others, some of which start external programs
FORMATS = ("PNG", "JPEG", "MPO", "WEBP", "BMP", "GIF", "TIFF", "AVIF", "JPEG2000")
# (offset in the file, bytes there, what it is, module that adds it to Pillow, its package, Pillow's name)
_OTHERS = (
    (
        4,
        (b"ftypheic", b"ftypheix", b"ftypheim", b"ftypheis", b"ftyphevc", b"ftypmif1", b"ftypmsf1"),
        "a HEIC image",
        "pillow_heif",
        "pillow-heif",
        "HEIF",
    ),
    (0, (b"\xff\x0a", b"\0\0\0\x0cJXL "), "a JPEG XL image", "pillow_jxl", "pillow-jxl-plugin", "JXL"),
)

# package → suffixes of images that it reads and this module does not
_READERS = {
    "rawpy": (".cr2", ".cr3", ".nef", ".arw", ".dng", ".raf", ".orf", ".rw2"),
    "cairosvg": (".svg",),
    "psd-tools": (".psd", ".psb"),
    "imageio": (".exr", ".hdr"),
}


class UnreadableImage(ValueError):
    """A file that cannot be read as an image; the text says why."""


class UnknownFormat(UnreadableImage):
    """An image, perhaps intact, in a format that is not supported."""


class Stored(Protocol):
    """The location of an image that is stored within another file: small, and can be pickled."""

    def open(self) -> BinaryIO: ...


Picture = Path | Stored


@contextmanager
def decoding() -> Iterator[None]:
    """A context that turns any exception into an `UnreadableImage`, since decoders raise all kinds on bad files."""
    try:
        yield
    except (UnreadableImage, InputError):
        raise
    except Exception as error:
        told = isinstance(error, (OSError, ValueError, SyntaxError)) and str(error)
        reason = str(error) if told else f"{type(error).__name__}: {error}"
        raise UnreadableImage(" ".join(reason.split())[:300]) from error


@contextmanager
def open_picture(picture: Picture) -> Iterator[BinaryIO]:
    """Open the bytes of an image as a file.

    Raises:
        UnreadableImage: there is no file, or it is not a regular file (e.g. a FIFO).
    """
    with decoding(), open_file(picture) if isinstance(picture, Path) else picture.open() as file:
        yield file


@contextmanager
def open_image(picture: Picture, max_pixels: int = MAX_PIXELS) -> Iterator[Image.Image]:
    """Open an image and read its header; errors within the context become an `UnreadableImage`, too.

    Raises:
        UnreadableImage: it is not an image of a known format, is damaged, or has more than `max_pixels`.
    """
    with open_picture(picture) as file, _LIMIT.of(max_pixels):
        image = _open(file)
        with image:
            if (pixels := image.width * image.height) > max_pixels:
                size = f"{image.width}×{image.height}"
                raise UnreadableImage(f"{size} px are {pixels:,}, more than data.max_pixels {max_pixels:,}; raise that")
            yield image


def _open(file: BinaryIO) -> Image.Image:
    head = file.read(16)
    for place, starts, what, module, package, name in _OTHERS:
        if not head[place:].startswith(starts):
            continue
        try:
            plugin = import_module(module)
        except ImportError:
            raise UnknownFormat(f"{what}, which needs the package {package}: pip install {package}") from None
        if hasattr(plugin, "register_heif_opener"):
            plugin.register_heif_opener()
        file.seek(0)
        return Image.open(file, formats=[name])
    file.seek(0)
    try:
        return Image.open(file, formats=_formats())
    except Image.UnidentifiedImageError:  # its own text names an object in memory
        raise UnreadableImage("cannot identify it as an image") from None


@lru_cache(maxsize=1)
def _formats() -> tuple[str, ...]:
    """The formats for which this Pillow has a decoder."""
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def unsupported(suffix: str) -> str:
    """Why files with this suffix, in lower case, are not read, and what would read them."""
    package = next((package for package, suffixes in _READERS.items() if suffix in suffixes), None)
    hint = f" ({package} reads it)" if package else ""
    return f"{suffix} is not a supported image format{hint}; convert it to PNG or JPEG"


class _PixelLimit:
    """Sets Pillow's own limit, which is global to the process, while images are open in any number of threads."""

    def __init__(self):
        self.lock, self.inside, self.undo = threading.Lock(), 0, ExitStack()

    @contextmanager
    def of(self, pixels: int) -> Iterator[None]:
        with self.lock:
            if not self.inside:
                self.undo.callback(setattr, Image, "MAX_IMAGE_PIXELS", Image.MAX_IMAGE_PIXELS)
                self.undo.enter_context(warnings.catch_warnings())
                warnings.simplefilter("ignore", Image.DecompressionBombWarning)
                Image.MAX_IMAGE_PIXELS = 0
            self.inside += 1
            # Pillow refuses images with more than twice its limit
            Image.MAX_IMAGE_PIXELS = max(Image.MAX_IMAGE_PIXELS, (pixels + 1) // 2)
        try:
            yield
        finally:
            with self.lock:
                self.inside -= 1
                if not self.inside:
                    self.undo.close()


_LIMIT = _PixelLimit()
