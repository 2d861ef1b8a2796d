"""The authors' two layouts: the JSON list of their internal data, and the folders of SA-1B (SAM)."""

import glob
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pixart.arguments import say
from pixart.data.folder import from_sidecars, read_text
from pixart.data.images import IMAGE_SUFFIXES
from pixart.data.items import Fields, Item
from pixart.errors import InputError
from pixart.files import inside, parse_json

LISTS = ("partition/data_info.json", "data_info.json")  # in the root of PixArt-α's data, of PixArt-Σ's
IMAGE_ROOTS = {"InternData": "InternImgs", "InternalData": "InternalImgs"}  # the authors' list folder → image folder


def read_official(path: Path, fields: Fields, images: str | None = None) -> Iterator[Item]:
    """The images of a list of {path, prompt, ratio, height, width, …}; ids are their `path`.

    Paths are relative to `images`. Without it, they are relative to the list's root (above `partition/`), or, as in the
    authors' data, to a folder `…/InternImgs/…` beside a root `…/InternData/…`, if there is one.

    Raises:
        InputError: there is no list, or it is malformed.
    """
    file = path if path.is_file() else next((path / name for name in LISTS if (path / name).is_file()), None)
    if file is None:
        raise InputError(
            f"data folder {path}: no {' or '.join(LISTS)} in it; expected one of them, or the path of the list itself"
        )
    root = Path(images) if images else _image_root(file)
    try:
        rows = parse_json(read_text(file, fields))
    except ValueError as error:
        raise InputError(f"{file}: not valid JSON ({error})") from None
    if not isinstance(rows, list):
        raise InputError(f"{file}: expected a list of objects with path and prompt, got a {type(rows).__name__}")
    seen = set()
    for number, row in enumerate(rows, 1):
        place = f"{file}, item {number}"
        if not isinstance(row, dict) or "path" not in row:
            raise InputError(f"{place}: expected an object with path and prompt, got {str(row)[:60]}")
        try:
            name = inside(row.pop("path"), "path")
            size = _size(row)
        except ValueError as error:
            raise InputError(f"{place}: {error}") from None
        problem = "is in the list twice; the second one is left out" if name in seen else None
        seen.add(name)
        found = fields.take(row)
        yield Item(name.as_posix(), root / name, found, place, f"no caption in {file.name}", size, problem)


def _image_root(file: Path) -> Path:
    root = file.parent.parent if file.parent.name == "partition" else file.parent
    official = Path(*(IMAGE_ROOTS.get(part, part) for part in root.resolve().parts))
    return official if official.is_dir() else root


def _size(row: dict[str, Any]) -> tuple[int, int] | None:
    if row.get("height") is None or row.get("width") is None:
        return None
    for name in ("height", "width"):
        value = row[name]
        if isinstance(value, bool) or not isinstance(value, (int, float)) or value <= 0 or value != int(value):
            raise ValueError(f"{name} is {say(value)}, expected a number of pixels")
    return int(row["height"]), int(row["width"])


def read_sam(path: Path, fields: Fields) -> Iterator[Item]:
    """The images that `partition/*.txt` list, one per line, with `.jpg` or without; ids are their paths in `images/`.

    `path` is the root, or one file of the partition. Captions are `captions/NAME.txt` (the field `text`) and
    `captions/NAME.FIELD.txt`.

    Raises:
        InputError: a folder of the layout is missing, or a name leads outside of it.
    """
    root = path.parent.parent if path.is_file() else path
    parts = [path] if path.is_file() else sorted((root / "partition").glob("*.txt"))
    for name in ("images", "captions") if fields.wanted else ("images",):
        if not (root / name).is_dir():
            raise InputError(
                f"data folder {root}: no {name}/ in it; the SAM layout has images/, captions/ and partition/"
            )
    if not parts:
        raise InputError(f"data folder {root}: no partition/*.txt in it, which list the images")
    # with 11 M caption files, look for as few of them as possible
    wanted = fields.wanted if fields.asked else [name for name in fields.wanted if name == "text"]
    seen: set[str] = set()
    for part in parts:
        for number, line in enumerate(read_text(part, fields).splitlines(), 1):
            if not line.strip():
                continue
            try:
                name = inside(line.strip(), "the line")
            except ValueError as error:
                raise InputError(f"{part}:{number}: {error}") from None
            if name.suffix.lower() not in IMAGE_SUFFIXES:
                name = name.with_name(name.name + _find_suffix(root / "images" / name))
            base, id = root / "captions" / name.with_suffix(""), name.as_posix()
            if id in seen:
                yield Item(id, None, {}, id, problem="is in the partition twice; the second one is left out")
                continue
            seen.add(id)
            yield from_sidecars(id, root / "images" / name, base, wanted, fields, "in captions/")
    if seen and not fields.seen.issuperset(wanted):  # find out what fields there are instead, from one image
        for text in base.parent.glob(f"{glob.escape(base.name)}*.txt"):
            fields.seen.add(text.name[len(base.name) : -len(".txt")].removeprefix(".") or "text")


def _find_suffix(stem: Path) -> str:
    """The suffix of the image with this stem; .jpg, the layout's default, if there is none."""
    suffixes = (".jpg", *sorted(IMAGE_SUFFIXES - {".jpg"}))
    return next((suffix for suffix in suffixes if stem.with_name(stem.name + suffix).exists()), ".jpg")
