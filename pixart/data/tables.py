"""Tables of the Hugging Face `datasets` library: imagefolder, parquet, and tables written by `save_to_disk`.

The library opens the table (and converts parquet to Arrow files in its cache, once); images are then read by row from
the memory-mapped Arrow files.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

from pixart.data.items import Fields, Item
from pixart.errors import InputError, missing_extra
from pixart.files import inside, read_json

SAVED = ("state.json", "dataset_dict.json")  # mark one saved table, and one table per split


@dataclass(frozen=True)
class Row:
    """The image in one row of an Arrow file."""

    file: str
    column: str
    row: int

    def open(self) -> BinaryIO:
        import pyarrow

        return pyarrow.BufferReader(_open_arrow(self.file).column(self.column)[self.row]["bytes"].as_buffer())


@lru_cache(maxsize=1024)  # number of files; a memory map takes no memory
def _open_arrow(file: str):
    import pyarrow

    return pyarrow.ipc.open_stream(pyarrow.memory_map(file)).read_all()


def read_table(path: Path, fields: Fields) -> Iterator[Item]:
    """The rows of a table (of its `train` split, if it has several). Ids are row numbers, or paths within a folder of
    images.

    Raises:
        InputError: the package is missing, it cannot read the table, or there is not exactly one image column.
    """
    table, split = _open_table(path)
    column = _image_column(path, table)
    names = [name for name in table.column_names if name != column and _holds_text(table.features[name])]
    fields.seen.update(names)
    wanted = [name for name in table.column_names if name != column and name in fields.wanted]
    start, root = 0, path.resolve()
    for file in (entry["filename"] for entry in table.cache_files):
        arrow = _open_arrow(file)
        offset = 0
        for batch in arrow.select([column, *wanted]).to_batches(max_chunksize=1000):
            try:
                texts = batch.select(wanted).to_pylist() if wanted else [{}] * len(batch)
                paths = batch.column(column).field("path").to_pylist()
            except ValueError as error:  # a text that is not UTF-8
                raise InputError(
                    f"{path}: damaged between rows {start + offset} and {start + offset + len(batch)} ({error})"
                ) from None
            empty = batch.column(column).field("bytes").is_null().to_pylist()
            for index, (row, name, hollow) in enumerate(zip(texts, paths, empty, strict=True)):
                number = start + offset + index
                id = f"{number:08d}"
                place = f"{path}{split}, row {number}"
                picture: Any = Row(file, column, offset + index)
                problem = "unreadable: the row holds no image" if hollow and not name else None
                if hollow and name:
                    picture = Path(name)
                    try:  # the library makes the names of files in the folder absolute
                        id = inside(os.path.relpath(name, root) if picture.is_absolute() else "..", "path").as_posix()
                    except ValueError:
                        problem = f"unreadable: the row names {name}; expected an image in the row, or a file in {path}"
                yield Item(id, picture, fields.take(row), place, f"no caption in {place}", problem=problem)
            offset += len(batch)
        start += offset
    if start != len(table):
        raise InputError(
            f"{path}: {len(table)} rows, but its files hold {start}; save it again after flatten_indices()"
        )


def _open_table(path: Path) -> tuple[Any, str]:
    """A `datasets.Dataset`, and its split as a suffix for messages."""
    try:
        import datasets
    except ImportError:
        raise missing_extra("datasets", "datasets", f"reading {path}") from None
    try:
        if path.is_dir() and any((path / name).is_file() for name in SAVED):
            _check_saved(path)
            table = datasets.load_from_disk(str(path))
        elif path.is_file():
            table = datasets.load_dataset("parquet", data_files=str(path))
        else:
            tables = [
                file for file in path.rglob("*.parquet") if file.name != "metadata.parquet"
            ]  # this name is imagefolder's
            kind = "parquet" if tables else "imagefolder"
            table = datasets.load_dataset(kind, data_dir=str(path))
    except InputError:
        raise
    except Exception as error:  # the library and pyarrow raise many kinds
        raise InputError(f"{path}: the package datasets cannot read it ({type(error).__name__}: {error})") from error
    if isinstance(table, datasets.Dataset):
        return table, ""
    if "train" not in table and len(table) > 1:
        raise InputError(f"{path}: it has the splits {', '.join(table)} but no train; point data.folder to one of them")
    split = "train" if "train" in table else next(iter(table))
    return table[split], f"[{split}]"


def _check_saved(path: Path) -> None:
    """Refuse a saved table whose description names files or splits outside its folder."""
    folders = [path]
    if (path / SAVED[1]).is_file():
        folders = [path / _inside(name, path / SAVED[1]) for name in _listed(path / SAVED[1], "splits")]
    for folder in folders:
        for file in _listed(folder / SAVED[0], "_data_files"):
            _inside(file.get("filename") if isinstance(file, dict) else file, folder / SAVED[0])


def _listed(path: Path, key: str) -> list:
    found = read_json(path).get(key)
    return found if isinstance(found, list) else []


def _inside(name: Any, path: Path) -> PurePosixPath:
    try:
        return inside(name, "a file")
    except ValueError as error:
        raise InputError(f"{path}: {error}") from None


def _image_column(path: Path, table: Any) -> str:
    import datasets

    columns = [
        name
        for name, feature in table.features.items()
        if isinstance(feature, datasets.Image) or (isinstance(feature, dict) and {*feature} == {"bytes", "path"})
    ]
    if len(columns) != 1:
        kinds = ", ".join(f"{name}: {type(feature).__name__}" for name, feature in table.features.items())
        raise InputError(f"{path}: expected one column of images (bytes and path), found {len(columns)} ({kinds})")
    return columns[0]


def _holds_text(feature: Any) -> bool:
    kind = getattr(feature, "feature", feature)  # the element type of a list
    return getattr(kind, "dtype", None) in ("string", "large_string")
