"""Folders of captioned images, as the Hugging Face imagefolder convention and most trainers have them.

Either a `metadata.jsonl` or `metadata.csv` with a `file_name` column and columns of captions; or beside each image
`name.png` a `name.txt` (the field `text`) and any `name.FIELD.txt`.
"""

import csv
import io
import json
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path

from pixart.data.images import IMAGE_SUFFIXES
from pixart.data.items import Fields, Item, inside
from pixart.errors import InputError


def read_folder(folder: Path, fields: Fields) -> Iterator[Item]:
    """The images of a folder; ids are their paths in it.

    Raises:
        InputError: it is no folder, or the metadata are not what they should be.
    """
    if not folder.is_dir():
        raise InputError(f"data folder {folder}: there is none; expected a folder of images with captions")
    for name, read in (("metadata.jsonl", read_jsonl), ("metadata.csv", _read_csv)):
        if (folder / name).exists():
            yield from _from_metadata(folder, folder / name, read(folder / name), fields)
            return
    texts: dict[Path, set[str]] = defaultdict(set)
    images: list[Path] = []
    for path in sorted(folder.rglob("*")):
        if path.suffix == ".txt":
            base = path.with_suffix("")
            texts[base].add("text")
            texts[base.with_suffix("")].add(base.suffix[1:])
        elif path.suffix.lower() in IMAGE_SUFFIXES and path.is_file():
            images.append(path)
    for path in images:
        base = path.with_suffix("")
        there = texts.get(base, set()) - {""}
        fields.seen |= there
        wanted = there.intersection(fields.wanted)
        yield from_sidecars(path.relative_to(folder).as_posix(), path, base, wanted, fields)


def from_sidecars(
    id: str, picture: Path, base: Path, wanted: Iterable[str], fields: Fields, where: str = "beside it"
) -> Item:
    """An image with those of its texts `base`.txt and `base`.FIELD.txt that are wanted."""
    found: dict[str, str] = {}
    for field in wanted:
        text = base.with_name(base.name + (".txt" if field == "text" else f".{field}.txt"))
        try:
            found[field] = text.read_text(encoding="utf-8-sig")
        except FileNotFoundError:
            continue
        except (OSError, UnicodeDecodeError) as error:
            return Item(id, picture, {}, id, problem=f"no caption: {text.name} cannot be read ({error})")
    lack = f"the .txt {where} is empty" if found else f"there is no .txt {where}"
    return Item(id, picture, fields.take(found), id, lack=f"no caption: {lack}")


def read_jsonl(path: Path, expected: str = "file_name and text") -> Iterator[dict]:
    """The objects of a JSON-lines file."""
    for number, line in enumerate(read_text(path).split("\n"), 1):  # splitlines would also split at U+2028
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise InputError(f"{path}:{number}: not valid JSON ({error})") from None
        if not isinstance(row, dict):
            raise InputError(f"{path}:{number}: expected an object with {expected}, got {line[:60]}")
        yield row


def _read_csv(path: Path) -> Iterator[dict]:
    rows = csv.DictReader(io.StringIO(read_text(path), newline=""))
    try:
        for row in rows:
            if None in row:
                raise InputError(
                    f"{path}:{rows.line_num}: more values than columns; a caption with a comma needs quotes around it"
                )
            yield row
    except csv.Error as error:
        raise InputError(f"{path}: not valid CSV after line {rows.line_num} ({error})") from None


def read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read ({error})") from None


def _from_metadata(folder: Path, metadata: Path, rows: Iterator[dict], fields: Fields) -> Iterator[Item]:
    seen = set()
    for number, row in enumerate(rows, 1):
        place = f"{metadata}, row {number}"
        if "file_name" not in row:
            raise InputError(f"{place}: no 'file_name'; there are {', '.join(map(str, row))}")
        try:
            name = inside(row.pop("file_name"), "file_name")
        except ValueError as error:
            raise InputError(f"{place}: {error}") from None
        if name in seen:
            raise InputError(f"{place}: '{name}' stands twice")
        seen.add(name)
        yield Item(name.as_posix(), folder / name, fields.take(row), place, lack=f"no caption in {metadata.name}")
