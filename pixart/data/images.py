"""Folders of captioned images: finding them, reading them, and saying what is wrong with them.

Two layouts, as the Hugging Face imagefolder convention and most trainers have them: a `metadata.jsonl` or
`metadata.csv` with a `file_name` column, or a `.txt` beside each image.
"""

import csv
import io
import json
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from pixart.buckets import Bucket, nearest_bucket
from pixart.errors import InputError

IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"}
CAPTION_COLUMNS = ("text", "caption", "captions", "prompt")


@dataclass(frozen=True)
class Record:
    """One usable image: its id (path within the folder), captions, size in pixels after rotation, and bucket."""

    id: str
    path: Path
    captions: tuple[str, ...]
    height: int
    width: int
    bucket: Bucket


@dataclass
class ScanReport:
    """What a folder holds; `problems` are (id, reason), unreadable images among them."""

    records: list[Record] = field(default_factory=list)
    problems: list[tuple[str, str]] = field(default_factory=list)
    unreadable: int = 0

    def describe(self) -> str:
        """A few lines for a person: images per bucket, dropped ones by reason, the first names."""
        counts = Counter((record.bucket.height, record.bucket.width) for record in self.records)
        lines = [
            f"{len(self.records)} images in {len(counts)} bucket{'s' * (len(counts) != 1)} (height × width: images)"
        ]
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


def scan_images(folder: str | Path, table: list[Bucket], *, max_crop: float = 0.5) -> ScanReport:
    """Find the captioned images of a folder and sort them into buckets; reads headers, not pixels.

    An image that would lose more than `max_crop` of its area to its bucket's crop is left out.

    Raises:
        InputError: no folder, no image, or no usable one; or more than 1 % of the files are unreadable.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"data folder {folder}: there is none; expected a folder of images with captions")
    report = ScanReport()
    total = 0
    for path, captions in _find_captions(folder):
        total += 1
        name = path.relative_to(folder).as_posix()
        captions = tuple(" ".join(caption.split()) for caption in captions if caption.strip())
        if not captions:
            report.problems.append((name, "no caption (no .txt beside it, or an empty one)"))
            continue
        try:
            height, width = _read_size(path)
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            report.problems.append((name, f"unreadable: {error}"))
            report.unreadable += 1
            continue
        bucket = nearest_bucket(table, height, width)
        kept = min(height / width, bucket.height / bucket.width) / max(height / width, bucket.height / bucket.width)
        if kept < 1 - max_crop:
            size = f"{width}×{height} px (width × height)"
            lost = f"{1 - kept:.0%} of it would be cropped away to fit {bucket.width}×{bucket.height}"
            report.problems.append((name, f"{size}: {lost}"))
            continue
        report.records.append(Record(name, path, captions, height, width, bucket))
    if not total:
        raise InputError(f"data folder {folder}: no images in it ({', '.join(sorted(IMAGE_SUFFIXES))})")
    check_unreadable(report.problems, report.unreadable, total)
    if not report.records:
        raise InputError(f"data folder {folder}: none of its {total} images can be used\n{report.describe()}")
    report.records.sort(key=lambda record: record.id)
    return report


def check_unreadable(problems: list[tuple[str, str]], unreadable: int, total: int) -> None:
    """A few bad files are skipped; more than 1 % (and more than one) are a damaged data set, and stop the run."""
    if unreadable > max(1, 0.01 * total):
        names = "\n".join(f"  {name}: {reason}" for name, reason in problems)
        raise InputError(
            f"{unreadable} of {total} images are unreadable, more than 1 %; remove or repair them:\n{names}"
        )


def load_image(path: Path, bucket: Bucket, *, crop: tuple[float, float] = (0.5, 0.5)) -> np.ndarray:
    """Read an image, resize it to cover its bucket and crop → uint8 (height, width, 3).

    CMYK, palette and 16-bit images become RGB, transparency becomes white, of an animation the first frame is taken.
    `crop` is where the crop lies in what is left over, 0 (top, left) … 1 (bottom, right).

    Raises:
        OSError, ValueError, SyntaxError: unreadable or truncated (PIL raises all three).
    """
    with Image.open(path) as file:
        image = to_rgb(ImageOps.exif_transpose(file))
    scale = max(bucket.height / image.height, bucket.width / image.width)
    size = max(round(image.width * scale), bucket.width), max(round(image.height * scale), bucket.height)
    if size != image.size:
        image = image.resize(size, Image.Resampling.BICUBIC)
    top, left = round((size[1] - bucket.height) * crop[0]), round((size[0] - bucket.width) * crop[1])
    return np.asarray(image.crop((left, top, left + bucket.width, top + bucket.height)))


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


def _read_size(path: Path) -> tuple[int, int]:
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        try:
            with Image.open(path) as image:
                width, height = image.size
                turned = image.getexif().get(0x0112, 1) in (5, 6, 7, 8)  # EXIF orientation
        except Image.DecompressionBombWarning as warning:
            raise ValueError(str(warning)) from None
    return (width, height) if turned else (height, width)


def _find_captions(folder: Path) -> Iterator[tuple[Path, list[str]]]:
    for name, read in (("metadata.jsonl", _read_jsonl), ("metadata.csv", _read_csv)):
        if (folder / name).exists():
            yield from _from_metadata(folder, folder / name, read(folder / name))
            return
    for path in sorted(folder.rglob("*")):
        if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file():
            text = path.with_suffix(".txt")
            yield path, [text.read_text(encoding="utf-8", errors="replace")] if text.exists() else []


def _read_jsonl(path: Path) -> Iterator[dict]:
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise InputError(f"{path}:{number}: not valid JSON ({error})") from None
        if not isinstance(row, dict):
            raise InputError(f"{path}:{number}: expected an object with file_name and text, got {line[:60]}")
        yield row


def _read_csv(path: Path) -> Iterator[dict]:
    yield from csv.DictReader(io.StringIO(path.read_text(encoding="utf-8-sig")))


def _from_metadata(folder: Path, metadata: Path, rows: Iterator[dict]) -> Iterator[tuple[Path, list[str]]]:
    column, seen = None, set()
    for number, row in enumerate(rows, 1):
        if "file_name" not in row:
            raise InputError(f"{metadata}, row {number}: no 'file_name'; there are {', '.join(map(str, row))}")
        if column is None:
            column = next((name for name in CAPTION_COLUMNS if name in row), None)
            if column is None:
                raise InputError(f"{metadata}: no caption column; expected one of {', '.join(CAPTION_COLUMNS)}")
        if row["file_name"] in seen:
            raise InputError(f"{metadata}, row {number}: '{row['file_name']}' stands twice")
        seen.add(row["file_name"])
        captions = row.get(column) or []
        yield folder / row["file_name"], [captions] if isinstance(captions, str) else [str(c) for c in captions]
