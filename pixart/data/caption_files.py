"""Caption files: JSON lines {"id": …, FIELD: …}, written by `pixart caption` and read as `data.captions`.

Several processes write one part each, `NAME-00002-of-00008.jsonl`; the name `NAME.jsonl` stands for all of them.
"""

import glob
from collections.abc import Iterator
from pathlib import Path

from pixart.arguments import say
from pixart.errors import InputError
from pixart.files import read_lines
from pixart.invocation import command


def is_file(name: str) -> bool:
    """Whether a key of `data.captions` is a caption file rather than a field."""
    return name.endswith(".jsonl")


def part_name(name: str | Path, rank: int, ranks: int) -> Path:
    """The file that one of `ranks` processes writes."""
    path = Path(name)
    return path if ranks == 1 else path.with_name(f"{path.stem}-{rank:05d}-of-{ranks:05d}{path.suffix}")


def find_parts(name: str | Path) -> list[Path]:
    """The files that a name or a glob stands for; empty if there are none."""
    path = Path(name)
    parts = path.parent.glob(f"{glob.escape(path.stem)}-[0-9][0-9][0-9][0-9][0-9]-of-[0-9][0-9][0-9][0-9][0-9].jsonl")
    found = [path] if path.is_file() else [Path(match) for match in glob.glob(str(name))]
    return sorted({*found, *parts})


def read_rows(path: Path) -> Iterator[tuple[str, str, dict]]:
    """(place, id, the rest) of each line; an incomplete last line, left by a kill, is ignored.

    Raises:
        InputError: any other line is damaged.
    """
    for number, row in read_lines(path):
        place = f"{path}:{number}"
        if not isinstance(row, dict) or not isinstance(row.get("id"), str) or len(row) != 2:
            raise InputError(f"{place}: expected an object with an id and one caption field, got {str(row)[:80]}")
        yield place, row.pop("id"), row


def read_captions(name: str | Path) -> dict[str, str | list[str]]:
    """Image id → caption, from all files that a name or glob stands for.

    Raises:
        InputError: there is no such file, it holds no captions, a line is damaged, or an image has two different
            captions.
    """
    parts = find_parts(name)
    if not parts:
        raise InputError(f"data.captions: there is no file {name}; expected one written by {command('caption')}")
    captions: dict[str, str | list[str]] = {}
    for part in parts:
        for place, id, row in read_rows(part):
            ((field, text),) = row.items()
            if not isinstance(text, str) and not (isinstance(text, list) and all(isinstance(t, str) for t in text)):
                raise InputError(f"{place}: {field} is {say(text)}, expected a text or a list of texts")
            if captions.setdefault(id, text) != text:
                raise InputError(
                    f"{place}: a second, different caption of '{id}'; give different sets of captions different names"
                )
    if not captions:
        raise InputError(f"data.captions: no captions in {', '.join(map(str, parts))}")
    return captions
