"""The table of image sizes for different aspect ratios (the authors' 40 sizes of about 1024² pixels)."""

from collections.abc import Sequence
from dataclasses import dataclass

from pixart.errors import InputError

# ratio height / width, as the authors round it → (height, width) at 1024 px
SIZES_1024: dict[float, tuple[int, int]] = {
    0.25: (512, 2048), 0.26: (512, 1984), 0.27: (512, 1920), 0.28: (512, 1856), 0.32: (576, 1792),
    0.33: (576, 1728), 0.35: (576, 1664), 0.4: (640, 1600), 0.42: (640, 1536), 0.48: (704, 1472),
    0.5: (704, 1408), 0.52: (704, 1344), 0.57: (768, 1344), 0.6: (768, 1280), 0.68: (832, 1216),
    0.72: (832, 1152), 0.78: (896, 1152), 0.82: (896, 1088), 0.88: (960, 1088), 0.94: (960, 1024),
    1.0: (1024, 1024), 1.07: (1024, 960), 1.13: (1088, 960), 1.21: (1088, 896), 1.29: (1152, 896),
    1.38: (1152, 832), 1.46: (1216, 832), 1.67: (1280, 768), 1.75: (1344, 768), 2.0: (1408, 704),
    2.09: (1472, 704), 2.4: (1536, 640), 2.5: (1600, 640), 2.89: (1664, 576), 3.0: (1728, 576),
    3.11: (1792, 576), 3.62: (1856, 512), 3.75: (1920, 512), 3.88: (1984, 512), 4.0: (2048, 512),
}  # fmt: skip
# PixArt-α samples only from these; PixArt-Σ from all
SAMPLING_RATIOS_ALPHA: tuple[float, ...] = tuple(
    ratio for ratio in SIZES_1024 if ratio not in (0.26, 0.27, 2.89, 3.11, 3.62, 3.75, 3.88)
)


@dataclass(frozen=True)
class Bucket:
    """An image size; `ratio` is the table's rounded key, which the network gets as the aspect ratio."""

    ratio: float
    height: int
    width: int


def bucket_table(resolution: int, multiple: int, *, square: bool = False) -> list[Bucket]:
    """The buckets at a resolution: the table scaled by resolution / 1024.

    Args:
        resolution: side in pixels of the square bucket.
        multiple: heights and widths are multiples of this: patch size × the autoencoder's downsampling.
        square: return only the square bucket.

    Raises:
        InputError: `resolution` is not a multiple of `multiple`. The other sizes are rounded to multiples, which the
            official resolutions never need; if several round to the same size, the one with the closest ratio is kept.
    """
    if resolution <= 0 or resolution % multiple:
        raise InputError(f"resolution {resolution} is not a multiple of {multiple}, the pixels of one token")
    if square:
        return [Bucket(1.0, resolution, resolution)]

    def scale(side: int) -> int:
        return max(round(side * resolution / 1024 / multiple), 1) * multiple

    table: dict[tuple[int, int], Bucket] = {}
    for ratio, (height, width) in SIZES_1024.items():
        size = scale(height), scale(width)
        if size not in table or abs(ratio - size[0] / size[1]) < abs(table[size].ratio - size[0] / size[1]):
            table[size] = Bucket(ratio, *size)
    return list(table.values())


def own_buckets(sizes: Sequence[tuple[int, int]], multiple: int) -> list[Bucket]:
    """A user's own table of (height, width) in pixels; ratios are rounded as in the authors' table.

    Raises:
        InputError: a size is not a multiple of `multiple`, or two sizes have the same rounded ratio: images go to the
            nearest ratio, so one of them would stay empty.
    """
    table: dict[float, Bucket] = {}
    for height, width in sizes:
        if min(height, width) <= 0 or height % multiple or width % multiple:
            raise InputError(f"buckets: {height}×{width} are not multiples of {multiple}, the pixels of one token")
        bucket = Bucket(round(height / width, 2), height, width)
        if other := table.get(bucket.ratio):
            raise InputError(
                f"buckets: {other.height}×{other.width} and {height}×{width} both have the ratio {bucket.ratio}; "
                "keep one of them"
            )
        table[bucket.ratio] = bucket
    return sorted(table.values(), key=lambda bucket: bucket.ratio)


def nearest_bucket(table: list[Bucket], height: int, width: int) -> Bucket:
    """The bucket whose ratio is nearest to height / width."""
    return min(table, key=lambda bucket: abs(bucket.ratio - height / width))
