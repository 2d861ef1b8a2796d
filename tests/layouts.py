"""The same captioned images in the layout of every data source, and scanning a source."""

import io
import json
import tarfile
from dataclasses import dataclass
from pathlib import Path

import pytest
from PIL import Image

from pixart.data.buckets import bucket_table
from pixart.data.config import DataConfig
from pixart.data.images import ScanReport
from pixart.data.sources import scan
from pixart.errors import InputError

SQUARE = bucket_table(8, 8, square=True)


@dataclass
class Sample:
    """A picture's file, and its captions by field."""

    path: Path
    fields: dict[str, str]


def look(folder: Path, **settings) -> ScanReport:
    """Scan a source with images of 8 × 8 px."""
    return scan(DataConfig(str(folder), **settings), SQUARE)


def refused(folder: Path, **settings) -> str:
    """The error of a source that cannot be scanned."""
    with pytest.raises(InputError) as caught:
        look(folder, **settings)
    return str(caught.value)


def from_folder(folder: Path, **more) -> list[Sample]:
    """The pictures of a folder with a `.txt` each; `more` are functions from that text to another field."""
    samples = []
    for path in sorted(folder.glob("*.png")):
        text = path.with_suffix(".txt").read_text()
        samples.append(Sample(path, {"text": text, **{name: make(text) for name, make in more.items()}}))
    return samples


def write(path: Path, data: bytes | str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    return path


def sidecar(field: str) -> str:
    return ".txt" if field == "text" else f".{field}.txt"


def as_folder(samples: list[Sample], root: Path) -> Path:
    for sample in samples:
        write(root / sample.path.name, sample.path.read_bytes())
        for field, text in sample.fields.items():
            write(root / (sample.path.stem + sidecar(field)), text)
    return root


def as_metadata(samples: list[Sample], root: Path) -> Path:
    for sample in samples:
        write(root / "pictures" / sample.path.name, sample.path.read_bytes())
    rows = [{"file_name": f"pictures/{sample.path.name}", **sample.fields} for sample in samples]
    write(root / "metadata.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    return root


def add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))


def as_webdataset(samples: list[Sample], root: Path, per_shard: int = 5) -> Path:
    """As img2dataset does it: picture, text, and a json that repeats the text and tells more."""
    root.mkdir(parents=True, exist_ok=True)
    for number, start in enumerate(range(0, len(samples), per_shard)):
        with tarfile.open(root / f"{number:05d}.tar", "w") as tar:
            for sample in samples[start : start + per_shard]:
                size = Image.open(sample.path).size
                facts = {"caption": sample.fields["text"], "url": "https://example.org", "key": sample.path.stem,
                         "status": "success", "error_message": None, "width": size[0], "height": size[1]}  # fmt: skip
                facts |= {field: text for field, text in sample.fields.items() if field != "text"}
                add(tar, sample.path.name, sample.path.read_bytes())
                add(tar, f"{sample.path.stem}.txt", sample.fields["text"].encode())
                add(tar, f"{sample.path.stem}.json", json.dumps(facts).encode())
    write(root / "00000.parquet", b"img2dataset puts one beside each shard")
    write(root / "00000_stats.json", "{}")
    return root


def make_table(samples: list[Sample]):
    import datasets

    rows = {"image": [{"bytes": s.path.read_bytes(), "path": s.path.name} for s in samples]}
    rows |= {field: [s.fields[field] for s in samples] for field in samples[0].fields}
    features = {"image": datasets.Image(), **{field: datasets.Value("string") for field in samples[0].fields}}
    return datasets.Dataset.from_dict(rows, features=datasets.Features(features))


def as_saved(samples: list[Sample], root: Path) -> Path:
    make_table(samples).save_to_disk(root, num_shards=2)
    return root


def as_saved_splits(samples: list[Sample], root: Path) -> Path:
    import datasets

    table = make_table(samples)
    datasets.DatasetDict({"test": table.select([0]), "train": table}).save_to_disk(root)
    return root


def as_parquet(samples: list[Sample], root: Path) -> Path:
    (root / "data").mkdir(parents=True)
    half = len(samples) // 2
    for number, part in enumerate((samples[:half], samples[half:])):
        make_table(part).to_parquet(root / "data" / f"train-{number:05d}-of-00002.parquet")
    return root


def as_official(samples: list[Sample], root: Path) -> Path:
    """PixArt-α's: the list in partition/, the pictures in a folder of another name."""
    items = []
    for sample in samples:
        width, height = Image.open(sample.path).size
        items.append({"path": f"00/{sample.path.name}", "prompt": sample.fields["text"], "ratio": height / width,
                      "height": height, "width": width})  # fmt: skip
        items[-1] |= {field: text for field, text in sample.fields.items() if field != "text"}
        write(root / "InternalImgs" / "set" / "00" / sample.path.name, sample.path.read_bytes())
    write(root / "InternalData" / "set" / "partition" / "data_info.json", json.dumps(items))
    return root / "InternalData" / "set"


def as_sam(samples: list[Sample], root: Path) -> Path:
    lines = []
    for number, sample in enumerate(samples):
        write(root / "images" / sample.path.name, sample.path.read_bytes())
        for field, text in sample.fields.items():
            write(root / "captions" / (sample.path.stem + sidecar(field)), text)
        lines.append(sample.path.stem if number % 2 else sample.path.name)  # both are about
    write(root / "partition" / "part0.txt", "\n".join(lines[::2]))
    write(root / "partition" / "part1.txt", "\n".join(lines[1::2]) + "\n")
    return root


# name → (who writes it, the format it is, the field of its usual caption)
LAYOUTS = {
    "folder": (as_folder, "folder", "text"),
    "metadata": (as_metadata, "folder", "text"),
    "webdataset": (as_webdataset, "webdataset", "text"),
    "saved": (as_saved, "datasets", "text"),
    "saved splits": (as_saved_splits, "datasets", "text"),
    "parquet": (as_parquet, "datasets", "text"),
    "imagefolder": (as_metadata, "datasets", "text"),
    "official": (as_official, "official", "prompt"),
    "sam": (as_sam, "sam", "text"),
}
