"""Reference images: their features, computed once and cached under a hash of everything that they depend on."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image

from pixart.data.decoding import UnreadableImage, open_image
from pixart.data.images import IMAGE_SUFFIXES, cover_and_crop, to_rgb
from pixart.errors import InputError
from pixart.evaluate.features import Extractor
from pixart.evaluate.frechet import Moments, moments
from pixart.evaluate.resize import Filter
from pixart.files import digest_file, digest_text, to_json, walk, write_file

Fit = Literal["exact", "crop", "stretch"]  # reference images of another size are refused, cropped or resized


@dataclass(frozen=True)
class Statistics:
    """The features of a reference by one extractor."""

    count: int  # number of images
    hash: str  # of images, extractor, filter and size
    moments: Moments
    features: np.ndarray | None  # (N, D); None if only the moments are known


def list_images(folder: Path) -> list[Path]:
    """The images of a folder and its subfolders, sorted by path.

    Raises:
        InputError: there are none.
    """
    if not folder.is_dir():
        raise InputError(f"{folder}: there is no such folder; expected a folder of images")
    found = sorted(path for path in walk(folder) if path.suffix.lower() in IMAGE_SUFFIXES)
    if not found:
        raise InputError(f"{folder}: no images in it ({', '.join(sorted(IMAGE_SUFFIXES))})")
    return found


def read_images(paths: list[Path], size: tuple[int, int], fit: Fit, what: str) -> np.ndarray:
    """Read images of the size (height, width) → (B, H, W, 3) uint8; `what` names them in errors.

    Raises:
        InputError: an image cannot be read, or has another size and `fit` is "exact".
    """
    height, width = size
    images = []
    for path in paths:
        try:
            with open_image(path) as opened:
                image = to_rgb(opened)
        except (UnreadableImage, OSError) as error:
            raise InputError(f"{what} {path}: cannot be read ({error}); repair or remove it") from None
        if image.size != (width, height):
            if fit == "exact":
                raise InputError(
                    f"{what} {path}: {image.width}×{image.height} px (width × height), expected {width}×{height} as of "
                    "the images that are scored; let --reference-fit crop or stretch it, or draw that size"
                )
            if fit == "crop":
                image = cover_and_crop(image, height, width)
            else:
                image = image.resize((width, height), Image.Resampling.LANCZOS)
        images.append(np.asarray(image))
    return np.stack(images)


def hash_images(paths: list[Path]) -> str:
    """A hash of the files' contents; names do not matter."""
    return digest_text(to_json(sorted(digest_file(path) for path in paths)))


def image_sizes(paths: list[Path]) -> Iterator[tuple[Path, tuple[int, int]]]:
    """(height, width) of every image, from its header."""
    for path in paths:
        try:
            with open_image(path) as image:
                yield path, (image.height, image.width)
        except (UnreadableImage, OSError) as error:
            raise InputError(f"{path}: cannot be read ({error}); repair or remove it") from None


def reference_statistics(
    source: Path, extractor: Extractor, filter: Filter, size: tuple[int, int], fit: Fit, cache: Path
) -> Statistics:
    """Statistics of a folder of images, or of a `.npz` with `mu` and `sigma`, as in ADM's evaluator and pytorch-fid.

    Raises:
        InputError: there is no such reference, its images have another size, or it was made with another filter.
    """
    if source.suffix == ".npz":
        return _read_npz(source, extractor, filter)
    paths = list_images(source)
    if len(paths) < 2:
        raise InputError(f"reference {source}: one image has no spread; expected at least 2")
    if fit == "exact":
        for path, found in image_sizes(paths):
            if found != size:
                read_images([path], size, fit, "reference")
    made_of = {
        "images": hash_images(paths),
        "extractor": extractor.name,
        "weights": extractor.weights,
        "filter": filter,
        "size": size,
        "fit": fit,
    }
    key = hashlib.sha256(to_json(made_of).encode()).hexdigest()[:32]
    file = cache / f"{key}.npy"
    if not file.exists():
        batches = [
            extractor(read_images(paths[start : start + 16], size, fit, "reference"), filter)
            for start in range(0, len(paths), 16)
        ]
        cache.mkdir(parents=True, exist_ok=True)

        def write(partial: Path) -> None:
            with open(partial, "wb") as opened:
                np.save(opened, np.concatenate(batches))

        write_file(file, write, durable=False, shared=True)
    features = np.load(file, allow_pickle=False)
    return Statistics(len(features), key, moments(features), features)


def _read_npz(source: Path, extractor: Extractor, filter: Filter) -> Statistics:
    try:
        with np.load(source, allow_pickle=False) as arrays:
            kept = {name: arrays[name] for name in arrays.files if name in ("mu", "sigma", "count", "filter")}
    except (OSError, ValueError) as error:
        raise InputError(f"reference {source}: cannot be read ({error}); expected mu and sigma in a .npz") from None
    if missing := [name for name in ("mu", "sigma") if name not in kept]:
        raise InputError(f"reference {source}: has no '{missing[0]}'; expected mu and sigma")
    made_with = str(kept["filter"]) if "filter" in kept else None
    if made_with not in (None, filter):
        raise InputError(f"reference {source}: made with filter {made_with}, not {filter}; set --filter {made_with}")
    if kept["mu"].shape != (extractor.size,) or kept["sigma"].shape != (extractor.size, extractor.size):
        raise InputError(
            f"reference {source}: mu has shape {kept['mu'].shape}, expected ({extractor.size},) as of {extractor.name}"
        )
    known = Moments(kept["mu"].astype(np.float64), kept["sigma"].astype(np.float64))
    return Statistics(int(kept.get("count", 0)), digest_file(source)[:32], known, None)
