"""Folders of captioned images, as in the Hugging Face imagefolder convention and most trainers.

Either one `metadata.jsonl` or `metadata.csv`, in the folder or below it, with a `file_name` column and caption columns;
or, beside each image `name.png`, a `name.txt` or `name.png.txt` (the field `text`) and any number of `name.FIELD.txt`.
Hidden files are left out.
"""

import csv
import io
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path

from pixart.data.decoding import unsupported
from pixart.data.images import IMAGE_SUFFIXES
from pixart.data.items import Fields, Item
from pixart.errors import InputError
from pixart.files import inside, parse_json, read_bytes, walk

NOTES = (".json", ".jsonl", ".csv", ".md", ".npz", ".npy", ".safetensors", "")  # files that may share an image's name


def read_folder(folder: Path, fields: Fields) -> Iterator[Item]:
    """The images of a folder; ids are their paths relative to it.

    Raises:
        InputError: it is not a folder, or its metadata file is malformed.
    """
    if not folder.is_dir():
        what = "it is a file" if folder.exists() else "no such folder"
        hint = "; give the folder that it is in" if folder.name in METADATA else ""
        hint = "; unpack it first" if folder.suffix.lower() in (".zip", ".rar", ".7z") else hint
        raise InputError(f"data folder {folder}: {what}; expected a folder of images with captions{hint}")
    for name, read in METADATA.items():
        if (folder / name).exists():
            yield from _from_metadata(folder, folder / name, read(folder / name, fields), fields)
            return
    found = [path for path in walk(folder) if not _is_hidden(path.relative_to(folder), fields)]
    lists = [path for path in found if path.name in METADATA]
    if len(lists) > 1:
        names = ", ".join(path.relative_to(folder).as_posix() for path in lists[:4])
        raise InputError(
            f"data folder {folder}: several lists of captions ({names}); point data.folder to the folder of one of "
            "them, or merge them into one list"
        )
    for path in lists:
        below = path.parent.relative_to(folder)
        yield from _from_metadata(folder, path, METADATA[path.name](path, fields), fields, below)
        found = [other for other in found if path.parent not in other.parents]
    yield from _with_sidecars(folder, found, fields)


def unread_files(folder: Path) -> str:
    """The end of an error about a folder without a usable image: files in it that may be meant as captions or images,
    and what to do with them."""
    names = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    hints = [
        (lambda name: name.lower() in METADATA and name not in METADATA, "rename it to its name in lower case"),
        (lambda name: name in METADATA, "it lists no image"),
        (lambda name: name.lower().endswith((".zip", ".rar", ".7z", ".tar.gz")), "unpack it"),
        (lambda name: name.endswith(".caption"), "captions are read from NAME.txt: rename these files"),
        (
            lambda name: name.lower().startswith(("metadata", "caption")) or name.endswith((".json", ".jsonl", ".csv")),
            "captions of a list are read from metadata.jsonl: one object with file_name and text a line",
        ),
    ]
    for fits, what in hints:
        if name := next(filter(fits, names), None):
            return f"; there is {name}: {what}"
    return ""


def _is_hidden(path: Path, fields: Fields) -> bool:
    """Whether a file is hidden, as macOS's notes on files (._NAME) and Jupyter's copies are; images are told."""
    hidden = any(part.startswith(".") for part in path.parts)
    if hidden and path.suffix.lower() in IMAGE_SUFFIXES:
        fields.tell("hidden images are left out", path.as_posix())
    return hidden


def _with_sidecars(folder: Path, found: list[Path], fields: Fields) -> Iterator[Item]:
    """The images among `found`, files in the order of their paths, with the texts beside them."""
    texts: dict[Path, set[str]] = defaultdict(set)
    for path in found:
        if path.suffix == ".txt":
            base = path.with_suffix("")
            texts[base].add("text")
            texts[base.with_suffix("")].add(base.suffix[1:])
    cased = {str(path).lower(): path for path in found if path.suffix.lower() == ".txt"}
    used = set()
    for path in found:
        base, id, suffix = path.with_suffix(""), path.relative_to(folder).as_posix(), path.suffix.lower()
        if suffix not in IMAGE_SUFFIXES:
            if "text" in texts.get(base, ()) and suffix not in (".txt", *NOTES):
                used.add(base)
                yield Item(id, None, {}, id, problem=unsupported(suffix))
            continue
        if "text" not in texts.get(base, ()) and "text" in texts.get(path, ()):
            base = path  # NAME.jpg.txt
        used.add(base)
        there = texts.get(base, set()) - {"", path.suffix[1:]}
        fields.seen |= there
        other = cased.get(f"{base}.txt".lower())
        if not there and other is not None:
            yield Item(id, path, {}, id, problem=f"no caption: {other.name} differs in case from {base.name}.txt")
            continue
        yield from_sidecars(id, path, base, there.intersection(fields.wanted), fields)
    for base in texts:
        if "text" in texts[base] and base not in used and base.with_suffix("") not in used:
            fields.tell(".txt files have no image beside them", f"{base.relative_to(folder).as_posix()}.txt")


def from_sidecars(
    id: str, picture: Path, base: Path, wanted: Iterable[str], fields: Fields, where: str = "beside it"
) -> Item:
    """An image with the wanted ones of its texts `base`.txt and `base`.FIELD.txt."""
    found: dict[str, str] = {}
    for field in wanted:
        text = base.with_name(base.name + (".txt" if field == "text" else f".{field}.txt"))
        try:
            found[field] = fields.decode(read_bytes(text), text.name)
        except FileNotFoundError:
            continue
        except (OSError, ValueError) as error:
            return Item(id, picture, {}, id, problem=f"unreadable: its caption {text.name}: {error}")
    lack = f"the .txt {where} is empty" if found else f"there is no .txt {where}"
    return Item(id, picture, fields.take(found), id, lack=f"no caption: {lack}")


def read_jsonl(path: Path, fields: Fields, expected: str = "file_name and text") -> Iterator[dict]:
    """The objects of a JSON-lines file."""
    for number, line in enumerate(read_text(path, fields).split("\n"), 1):  # splitlines would also split at U+2028
        if not line.strip():
            continue
        try:
            row = parse_json(line)
        except ValueError as error:
            raise InputError(f"{path}:{number}: not valid JSON, of which each line is an object ({error})") from None
        if not isinstance(row, dict):
            raise InputError(f"{path}:{number}: expected one object with {expected} on each line, got {line[:60]}")
        yield row


def _read_csv(path: Path, fields: Fields) -> Iterator[dict]:
    rows = csv.DictReader(io.StringIO(read_text(path, fields), newline=""), strict=True)
    try:
        for row in rows:
            if None in row:
                raise InputError(
                    f"{path}:{rows.line_num}: more values than columns; a caption with a comma needs quotes around it"
                )
            yield row
    except csv.Error as error:
        raise InputError(f"{path}: not valid CSV after line {rows.line_num} ({error})") from None


def read_text(path: Path, fields: Fields) -> str:
    """The text of a file of a source. Raises InputError if it cannot be read."""
    try:
        return fields.decode(read_bytes(path), path.name)
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read ({error})") from None


METADATA = {"metadata.jsonl": read_jsonl, "metadata.csv": _read_csv}


def _from_metadata(
    folder: Path, metadata: Path, rows: Iterator[dict], fields: Fields, below: Path = Path()
) -> Iterator[Item]:
    """The images of a list, whose file names are relative to the list's folder `below` the source's."""
    seen = set()
    for number, row in enumerate(rows, 1):
        place = f"{metadata}, row {number}"
        if "file_name" not in row:
            names = ", ".join(map(str, row))[:200]
            hint = "; columns are separated by commas" if re.search("[;\t|]", names) else ""
            raise InputError(f"{place}: no 'file_name'; there are {names}{hint}")
        try:
            name = inside(row.pop("file_name"), "file_name")
        except ValueError as error:
            raise InputError(f"{place}: {error}") from None
        if name in seen:
            raise InputError(
                f"{place}: '{name}' is listed twice; several captions of an image go into one row, as a list"
            )
        seen.add(name)
        id, picture = (below / name).as_posix(), folder / below / name
        yield Item(id, picture, fields.take(row), place, lack=f"no caption in {metadata.name}")
