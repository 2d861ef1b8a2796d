"""Folders of captioned images: finding them, reading them, and saying what is wrong with them.

Two layouts, as the Hugging Face imagefolder convention and most trainers have them: a `metadata.jsonl` or
`metadata.csv` with a `file_name` column, or a `.txt` beside each image.
"""

import csv
import io
import json
import struct
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

import numpy as np
from PIL import Image, ImageOps

from pixart.buckets import Bucket, nearest_bucket
from pixart.errors import InputError

IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"}
CAPTION_COLUMNS = ("text", "caption", "captions", "prompt")
UNREADABLE = (OSError, ValueError, SyntaxError, Image.DecompressionBombError)  # what PIL raises for bad files


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
        InputError: no folder, no image, or no usable one; more than 1 % of the files are unreadable; or the metadata is
            not what it should be.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"data folder {folder}: there is none; expected a folder of images with captions")
    report = ScanReport()
    total = 0
    for path, captions, lack in _find_captions(folder):
        total += 1
        name = path.relative_to(folder).as_posix()
        captions = tuple(" ".join(caption.split()) for caption in captions if caption.strip())
        if not captions:
            report.problems.append((name, lack))
            continue
        try:
            height, width = _read_size(path)
        except UNREADABLE as error:
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
    check_unreadable([p for p in report.problems if p[1].startswith("unreadable: ")], report.unreadable, total)
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
        UNREADABLE: one of these, for a file that is no image, or truncated.
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
    """Height and width as `load_image` will find them."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        try:
            with Image.open(path) as image:
                if image.format == "TIFF":  # PIL turns these itself, at the latest when it loads them
                    image.load()
                # PNG's own getexif would decode the pixels, to look for EXIF behind them
                exif = Image.Image.getexif(image)
                if image.format == "PNG" and "exif" not in image.info and (data := _find_png_exif(path)):
                    exif.load(data)
                width, height = image.size
        except Image.DecompressionBombWarning as warning:
            raise ValueError(str(warning)) from None
    turned = exif.get(0x0112, 1) in (5, 6, 7, 8)  # EXIF orientation
    return (width, height) if turned else (height, width)


def _find_png_exif(path: Path) -> bytes:
    """The eXIf chunk of a PNG; empty if there is none. Steps over the others."""
    with open(path, "rb") as file:
        file.seek(8)
        while len(head := file.read(8)) == 8:
            length, kind = struct.unpack(">I4s", head)
            if kind == b"eXIf":
                return b"Exif\0\0" + file.read(length)
            file.seek(length + 4, 1)
    return b""


def _find_captions(folder: Path) -> Iterator[tuple[Path, list[str], str]]:
    """Images, their captions, and what to say if there is none."""
    for name, read in (("metadata.jsonl", _read_jsonl), ("metadata.csv", _read_csv)):
        if (folder / name).exists():
            for path, captions in _from_metadata(folder, folder / name, read(folder / name)):
                yield path, captions, f"no caption in {name}"
            return
    for path in sorted(folder.rglob("*")):
        if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file():
            text = path.with_suffix(".txt")
            try:
                yield path, [text.read_text(encoding="utf-8-sig")], "no caption: the .txt beside it is empty"
            except FileNotFoundError:
                yield path, [], "no caption: there is no .txt beside it"
            except (OSError, UnicodeDecodeError) as error:
                yield path, [], f"no caption: {text.name} cannot be read ({error})"


def _read_jsonl(path: Path) -> Iterator[dict]:
    for number, line in enumerate(_read_metadata(path).split("\n"), 1):  # splitlines would also split at U+2028
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
    rows = csv.DictReader(io.StringIO(_read_metadata(path), newline=""))
    try:
        for row in rows:
            if None in row:
                raise InputError(
                    f"{path}:{rows.line_num}: more values than columns; a caption with a comma needs quotes around it"
                )
            yield row
    except csv.Error as error:
        raise InputError(f"{path}: not valid CSV after line {rows.line_num} ({error})") from None


def _read_metadata(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read ({error})") from None


def _from_metadata(folder: Path, metadata: Path, rows: Iterator[dict]) -> Iterator[tuple[Path, list[str]]]:
    column, seen = None, set()
    for number, row in enumerate(rows, 1):
        place = f"{metadata}, row {number}"
        if "file_name" not in row:
            raise InputError(f"{place}: no 'file_name'; there are {', '.join(map(str, row))}")
        if column is None:
            column = next((name for name in CAPTION_COLUMNS if name in row), None)
            if column is None:
                raise InputError(f"{metadata}: no caption column; expected one of {', '.join(CAPTION_COLUMNS)}")
        if not isinstance(row["file_name"], str) or not row["file_name"]:
            raise InputError(f"{place}: file_name is {row['file_name']!r}, expected a path within the folder")
        name = PurePosixPath(row["file_name"])
        if name.is_absolute() or ".." in name.parts:
            raise InputError(f"{place}: '{name}' leads out of the folder; expected a path within it")
        if name in seen:
            raise InputError(f"{place}: '{name}' stands twice")
        seen.add(name)
        captions = row.get(column) or []
        captions = [captions] if isinstance(captions, str) else captions
        if not isinstance(captions, list) or not all(isinstance(caption, str) for caption in captions):
            raise InputError(f"{place}: {column} is {row[column]!r}, expected a text or a list of texts")
        yield folder / name, captions
