"""Captioned images from any source → records in buckets, and the problems of images that cannot be used.

Only headers are read, not pixels. A source is a function that yields an `Item` per image; this file chooses the
function, weights the captions, and sorts the images into buckets.
"""

import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from pixart.arguments import say
from pixart.data.buckets import Bucket, bucket_table, nearest_bucket, own_buckets
from pixart.data.caption_files import is_file, read_captions
from pixart.data.config import DataConfig
from pixart.data.decoding import Picture, UnknownFormat, UnreadableImage
from pixart.data.folder import read_folder, unread_files
from pixart.data.images import IMAGE_SUFFIXES, Record, ScanReport, check_unreadable, count_bytes, read_size
from pixart.data.items import CAPTION_COLUMNS, Fields, Item
from pixart.data.lists import LISTS, read_official, read_sam
from pixart.data.tables import read_table
from pixart.data.webdataset import PACKED_SUFFIXES, read_webdataset
from pixart.errors import InputError
from pixart.registry import Registry
from pixart.unicode import is_whole, tidy

# each entry: a function of the source's path and the wanted caption fields that yields an `Item` per image
SOURCES: Registry[Callable[..., Iterator[Item]]] = Registry("data.format")
for _name, _reader in (
    ("folder", read_folder),
    ("webdataset", read_webdataset),
    ("datasets", read_table),
    ("official", read_official),
    ("sam", read_sam),
):
    SOURCES.register(_name)(_reader)


def make_table(config: DataConfig, multiple: int) -> list[Bucket]:
    """The buckets that `config` asks for; `multiple` as in `bucket_table`."""
    if config.buckets:
        return own_buckets(config.buckets, multiple)
    return bucket_table(config.resolution, multiple, square=not config.aspect_ratios)


def scan(config: DataConfig, table: list[Bucket]) -> ScanReport:
    """Find the captioned images of a source and sort them into buckets; records are sorted by id.

    An image that would lose more than `config.max_crop` of its area to its bucket's crop is left out.

    Raises:
        InputError: there is no source, no image, or no usable one; more than 1 % of the files are unreadable; no image
            has a caption field that is asked for; or a file of the source is malformed.
    """
    asked = [name for name in config.captions if not is_file(name)]
    fields = Fields(asked if config.captions or config.caption is not None else None)
    kind, items = read_items(config, fields)
    items = list(items)
    if not items:
        raise InputError(
            f"data folder {config.folder}, read as {kind}: no images in it ({', '.join(sorted(IMAGE_SUFFIXES))})"
            + (unread_files(Path(config.folder)) if kind == "folder" else "")
        )
    weights = {} if config.caption is not None else config.captions or {_default_field(items, fields): 1.0}
    _check_fields(config, fields)
    files = {name: _read_file(name, items, config) for name in config.captions if is_file(name)}
    report, taken = ScanReport(), Counter()
    same: dict[tuple, tuple] = {}  # one tuple for the many records with the same weights
    for item in items:
        captions, shares, used = _weigh(item, weights, files)
        problem = item.problem or (None if captions else _lack(item, config.captions))
        if config.caption is not None:  # a problem of its own caption is none
            problem = item.problem if item.problem and "caption" not in item.problem else None
            captions, shares = (config.caption,), (1.0,)
        if problem is None:
            placed = _place(item, table, config)
            if not isinstance(placed, str):
                taken.update(used)
                report.records.append(Record(item.id, item.picture, captions, same.setdefault(shares, shares), *placed))
                continue
            problem = placed
        report.problems.append((item.id, problem))
    unreadable = [problem for problem in report.problems if problem[1].startswith("unreadable: ")]
    report.unreadable = len(unreadable)
    check_unreadable(unreadable, len(unreadable), len(items))
    named = [
        f"{name} × {weight:g} ({taken[name]} images)" if config.captions else name for name, weight in weights.items()
    ]
    report.source = f"read as {kind}; captions: " + (", ".join(named) or f"of all images '{config.caption}'")
    report.notes += _notes(fields, items, weights, files)
    if not report.records:
        raise InputError(
            f"data folder {config.folder}: none of its {len(items)} images can be used"
            + (unread_files(Path(config.folder)) if kind == "folder" else "")
            + f"\n{report.describe()}"
        )
    report.records.sort(key=lambda record: record.id)
    return report


def read_items(config: DataConfig, fields: Fields) -> tuple[str, Iterator[Item]]:
    """The format of a source, and its images in the order in which they are found.

    Raises:
        InputError: there is no such source.
    """
    if not config.folder:
        raise InputError("data.folder: not set; expected a folder of images with captions")
    path = Path(config.folder)
    if not path.exists():
        raise InputError(f"data folder {path}: no such folder; expected a folder of images with captions")
    if not path.is_dir() and not path.is_file():
        raise InputError(f"data folder {path}: it is a FIFO or device; expected a folder of images with captions")
    kind = recognise(path) if config.format == "auto" else config.format
    if config.images is not None and kind != "official":
        raise InputError(f"data.images is only for the paths of an official list, but {path} is read as {kind}")
    options = {"images": config.images} if kind == "official" else {}
    return kind, SOURCES[kind](path, fields, **options)


def recognise(path: Path) -> str:
    """Recognise the format of a source by its files."""
    if path.is_file():
        by_suffix = {".json": "official", ".txt": "sam", ".parquet": "datasets", ".tar": "webdataset"}
        suffix = ".tar" if path.name.endswith(PACKED_SUFFIXES) else path.suffix
        return by_suffix.get(suffix, "folder")
    names = {entry.name for entry in os.scandir(path)}
    folders = {name for name in names if (path / name).is_dir()}
    if names & {"metadata.jsonl", "metadata.csv"}:
        return "folder"
    if any(name.endswith((".tar", *PACKED_SUFFIXES)) for name in names):  # img2dataset puts a .parquet beside each
        return "webdataset"
    if any((path / name).is_file() for name in LISTS):
        return "official"
    if {"images", "partition"} <= names and any(path.glob("partition/*.txt")):
        return "sam"
    if any(name.endswith(".parquet") and name.removesuffix(".parquet") in folders for name in names):
        return "folder"  # img2dataset's output_format files: a folder of images, and a .parquet of its log
    if names & {"state.json", "dataset_dict.json"} or any(path.glob("*.parquet")) or any(path.glob("data/*.parquet")):
        return "datasets"
    return "folder"


def _notes(
    fields: Fields, items: list[Item], weights: Mapping[str, float], files: Mapping[str, Mapping[str, Any]]
) -> list[str]:
    """What was left out or read in another way than it was written."""
    half = "captions hold half a character (a lone surrogate), replaced by U+FFFD"
    for item in items:
        values = [files[name].get(item.id) if name in files else item.fields.get(name) for name in weights]
        if not all(is_whole(text) for value in values for text in ([value] if isinstance(value, str) else value or ())):
            fields.tell(half, item.id)
    return fields.notes


def _default_field(items: list[Item], fields: Fields) -> str:
    """The caption field to use if the config names none."""
    if name := next((name for name in CAPTION_COLUMNS if name in fields.seen), None):
        return name
    if fields.seen:
        place = items[0].place.partition(", ")[0]
        raise InputError(
            f"{place}: no caption column; expected one of {', '.join(CAPTION_COLUMNS)}, "
            f"or another one's name in data.captions; there are {', '.join(sorted(fields.seen))}"
        )
    return CAPTION_COLUMNS[0]


def _check_fields(config: DataConfig, fields: Fields) -> None:
    for name in config.captions:
        if not is_file(name) and name not in fields.seen:
            there = f"there are {', '.join(sorted(fields.seen))}" if fields.seen else "there are no caption fields"
            raise InputError(f"data.captions: no image of {config.folder} has the field '{name}'; {there}")


def _read_file(name: str, items: list[Item], config: DataConfig) -> dict[str, Any]:
    """The captions of a file written by `pixart caption`."""
    captions = read_captions(name)
    if captions and not any(item.id in captions for item in items):
        raise InputError(
            f"data.captions: {name} belongs to other images: none of its {len(captions)} ids is in {config.folder}; "
            f"its ids look like '{next(iter(captions))}', those of the folder like '{items[0].id}'"
        )
    return captions


def _weigh(
    item: Item, weights: Mapping[str, float], files: Mapping[str, Mapping[str, Any]]
) -> tuple[tuple[str, ...], tuple[float, ...], list[str]]:
    """An image's captions, their weights, and the fields they come from.

    A list of texts shares its field's weight; the weight of a field that the image lacks goes to the others.
    """
    captions, shares, used = [], [], []
    for name, weight in weights.items():
        if not weight:
            continue
        value = files[name].get(item.id) if name in files else item.fields.get(name)
        texts = [] if value is None else [value] if isinstance(value, str) else value
        if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
            raise InputError(f"{item.place}: {name} is {say(value)}, expected a text or a list of texts")
        if texts := [tidied for text in texts if (tidied := tidy(text))]:
            captions += texts
            shares += [weight / len(texts)] * len(texts)
            used.append(name)
    total = sum(shares)
    return tuple(captions), tuple(share / total for share in shares), used


def _lack(item: Item, weights: Mapping[str, float]) -> str:
    return f"no caption in {', '.join(name for name in weights if weights[name])}" if weights else item.lack


def _same_but_for_case(picture: Picture) -> str:
    """The end of an error about an image that is not there: the file whose name differs in case alone, if any."""
    if not isinstance(picture, Path) or picture.exists():
        return ""
    if "\\" in picture.name and (picture.parent / picture.name.replace("\\", "/")).exists():
        return "; file names have / between folders, not \\"
    name = _names_of(picture.parent).get(picture.name.lower())
    return f"; there is {name}, which differs in case alone" if name else ""


@lru_cache(maxsize=64)
def _names_of(folder: Path) -> dict[str, str]:
    return {name.lower(): name for name in os.listdir(folder)} if folder.is_dir() else {}


def _place(item: Item, table: list[Bucket], config: DataConfig) -> tuple[int, int, Bucket, int] | str:
    """Height, width, bucket and file size in bytes of an image, or why it cannot be used."""
    try:
        height, width, turned = read_size(item.picture, config.max_pixels)
        length = count_bytes(item.picture)
    except UnknownFormat as error:
        return str(error)
    except UnreadableImage as error:
        return f"unreadable: {error}{_same_but_for_case(item.picture)}"
    if item.size not in (None, (height, width), (width, height) if turned else None):
        told = f"{item.size[1]}×{item.size[0]}"
        return f"{item.place} says {told} px (width × height), but the image has {width}×{height}"
    bucket = nearest_bucket(table, height, width)
    kept = min(height / width, bucket.height / bucket.width) / max(height / width, bucket.height / bucket.width)
    if kept < 1 - config.max_crop:
        size = f"{width}×{height} px (width × height)"
        return f"{size}: {1 - kept:.0%} of it would be cropped away to fit {bucket.width}×{bucket.height}"
    return height, width, bucket, length
