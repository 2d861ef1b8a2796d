"""Captioned pictures from any source → records in buckets; and what is wrong with the others.

Reads headers, not pixels. A source is a reader that yields an `Item` a picture; this file chooses the reader, weighs
the captions, and sorts the pictures into buckets.
"""

import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from pixart.data.buckets import Bucket, bucket_table, nearest_bucket, own_buckets
from pixart.data.caption_files import is_file, read_captions
from pixart.data.config import DataConfig
from pixart.data.folder import read_folder
from pixart.data.images import IMAGE_SUFFIXES, UNREADABLE, Record, ScanReport, check_unreadable, read_size
from pixart.data.items import CAPTION_COLUMNS, Fields, Item
from pixart.data.lists import LISTS, read_official, read_sam
from pixart.data.tables import read_table
from pixart.data.webdataset import PACKED_SUFFIXES, read_webdataset
from pixart.errors import InputError
from pixart.registry import Registry

# each entry: a function of the source's path and the caption fields that are wanted, which yields an `Item` an image
SOURCES: Registry[Callable[..., Iterator[Item]]] = Registry("data.format")
for _name, _reader in (
    ("folder", read_folder), ("webdataset", read_webdataset), ("datasets", read_table), ("official", read_official),
    ("sam", read_sam),
):  # fmt: skip
    SOURCES.register(_name)(_reader)


def make_table(config: DataConfig, multiple: int) -> list[Bucket]:
    """The buckets that `config` asks for; `multiple` as in `bucket_table`."""
    if config.buckets:
        return own_buckets(config.buckets, multiple)
    return bucket_table(config.resolution, multiple, square=not config.aspect_ratios)


def scan(config: DataConfig, table: list[Bucket]) -> ScanReport:
    """Find the captioned pictures of a source and sort them into buckets; records come in the order of their ids.

    A picture that would lose more than `config.max_crop` of its area to its bucket's crop is left out.

    Raises:
        InputError: no source, no picture, or no usable one; more than 1 % of the files are unreadable; a caption field
            that no picture has; or a file of the source is not what it should be.
    """
    fields = Fields([name for name in config.captions if not is_file(name)] if config.captions else None)
    kind, items = read_items(config, fields)
    items = list(items)
    if not items:
        raise InputError(
            f"data folder {config.folder}, read as {kind}: no images in it ({', '.join(sorted(IMAGE_SUFFIXES))})"
        )
    weights = config.captions or {_default_field(items, fields): 1.0}
    _check_fields(config, fields)
    files = {name: _read_file(name, items, config) for name in config.captions if is_file(name)}
    report, taken = ScanReport(), Counter()
    same: dict[tuple, tuple] = {}  # one tuple for the many records with the same weights
    for item in items:
        captions, shares, used = _weigh(item, weights, files)
        problem = item.problem or (None if captions else _lack(item, config.captions))
        if problem is None:
            placed = _place(item, table, config.max_crop)
            if not isinstance(placed, str):
                taken.update(used)
                report.records.append(Record(item.id, item.picture, captions, same.setdefault(shares, shares), *placed))
                continue
            problem = placed
        report.problems.append((item.id, problem))
    unreadable = [problem for problem in report.problems if problem[1].startswith("unreadable: ")]
    report.unreadable = len(unreadable)
    check_unreadable(unreadable, len(unreadable), len(items))
    report.source = f"read as {kind}; captions: " + ", ".join(
        f"{name} × {weight:g} ({taken[name]} images)" if config.captions else name for name, weight in weights.items()
    )
    if not report.records:
        raise InputError(
            f"data folder {config.folder}: none of its {len(items)} images can be used\n{report.describe()}"
        )
    report.records.sort(key=lambda record: record.id)
    return report


def read_items(config: DataConfig, fields: Fields) -> tuple[str, Iterator[Item]]:
    """The format of a source, and its pictures as they come.

    Raises:
        InputError: there is no such source.
    """
    if not config.folder:
        raise InputError("data.folder: there is none; expected a folder of images with captions")
    path = Path(config.folder)
    if not path.exists():
        raise InputError(f"data folder {path}: there is none; expected a folder of images with captions")
    kind = recognise(path) if config.format == "auto" else config.format
    if config.images is not None and kind != "official":
        raise InputError(f"data.images is where an official list's paths start, but {path} is read as {kind}")
    options = {"images": config.images} if kind == "official" else {}
    return kind, SOURCES[kind](path, fields, **options)


def recognise(path: Path) -> str:
    """The format that the files of a source show."""
    if path.is_file():
        by_suffix = {".json": "official", ".txt": "sam", ".parquet": "datasets", ".tar": "webdataset"}
        suffix = ".tar" if path.name.endswith(PACKED_SUFFIXES) else path.suffix
        return by_suffix.get(suffix, "folder")
    names = {entry.name for entry in os.scandir(path)}
    if names & {"metadata.jsonl", "metadata.csv"}:
        return "folder"
    if any(name.endswith((".tar", *PACKED_SUFFIXES)) for name in names):  # img2dataset puts a .parquet beside each
        return "webdataset"
    if any((path / name).is_file() for name in LISTS):
        return "official"
    if {"images", "partition"} <= names and any(path.glob("partition/*.txt")):
        return "sam"
    if names & {"state.json", "dataset_dict.json"} or any(path.glob("*.parquet")) or any(path.glob("data/*.parquet")):
        return "datasets"
    return "folder"


def _default_field(items: list[Item], fields: Fields) -> str:
    """The caption field if the config names none."""
    if name := next((name for name in CAPTION_COLUMNS if name in fields.seen), None):
        return name
    if fields.seen:
        place = items[0].place.partition(", ")[0]
        raise InputError(
            f"{place}: no caption column; expected one of {', '.join(CAPTION_COLUMNS)}, "
            f"or data.captions with one's name; there are {', '.join(sorted(fields.seen))}"
        )
    return CAPTION_COLUMNS[0]


def _check_fields(config: DataConfig, fields: Fields) -> None:
    for name in config.captions:
        if not is_file(name) and name not in fields.seen:
            there = f"there are {', '.join(sorted(fields.seen))}" if fields.seen else "there are no caption fields"
            raise InputError(f"data.captions: no image of {config.folder} has the field '{name}'; {there}")


def _read_file(name: str, items: list[Item], config: DataConfig) -> dict[str, Any]:
    """The captions of a file of scripts/caption.py."""
    captions = read_captions(name)
    if captions and not any(item.id in captions for item in items):
        raise InputError(
            f"data.captions: {name} is of other images: none of its {len(captions)} ids is in {config.folder}; its are "
            f"like '{next(iter(captions))}', there they are like '{items[0].id}'"
        )
    return captions


def _weigh(
    item: Item, weights: Mapping[str, float], files: Mapping[str, Mapping[str, Any]]
) -> tuple[tuple[str, ...], tuple[float, ...], list[str]]:
    """A picture's captions, their weights, and the fields they come from.

    A list of texts shares its field's weight; the weight of a field that the picture lacks goes to the others.
    """
    captions, shares, used = [], [], []
    for name, weight in weights.items():
        if not weight:
            continue
        value = files[name].get(item.id) if name in files else item.fields.get(name)
        texts = [] if value is None else [value] if isinstance(value, str) else value
        if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
            raise InputError(f"{item.place}: {name} is {value!r}, expected a text or a list of texts")
        if texts := [" ".join(text.split()) for text in texts if text.strip()]:
            captions += texts
            shares += [weight / len(texts)] * len(texts)
            used.append(name)
    total = sum(shares)
    return tuple(captions), tuple(share / total for share in shares), used


def _lack(item: Item, weights: Mapping[str, float]) -> str:
    return f"no caption in {', '.join(name for name in weights if weights[name])}" if weights else item.lack


def _place(item: Item, table: list[Bucket], max_crop: float) -> tuple[int, int, Bucket] | str:
    """Height, width and bucket of a picture, or why it cannot be used."""
    try:
        height, width, turned = read_size(item.picture)
    except UNREADABLE as error:
        return f"unreadable: {error}"
    if item.size not in (None, (height, width), (width, height) if turned else None):
        told = f"{item.size[1]}×{item.size[0]}"
        return f"{item.place} says {told} px (width × height), the picture has {width}×{height}"
    bucket = nearest_bucket(table, height, width)
    kept = min(height / width, bucket.height / bucket.width) / max(height / width, bucket.height / bucket.width)
    if kept < 1 - max_crop:
        size = f"{width}×{height} px (width × height)"
        return f"{size}: {1 - kept:.0%} of it would be cropped away to fit {bucket.width}×{bucket.height}"
    return height, width, bucket
