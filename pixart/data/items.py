"""What every source knows of its images before any of them is opened: ids, locations, caption fields."""

from collections import defaultdict
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from pixart.data.decoding import Picture
from pixart.unicode import decode_text

CAPTION_COLUMNS = ("text", "caption", "captions", "prompt")  # caption fields tried by default


@dataclass(frozen=True)
class Item:
    """An image as its source describes it."""

    id: str
    picture: Picture | None  # None only with a problem
    fields: dict[str, Any]  # caption field → the source's value, unchecked
    place: str  # location of the entry in the source, for error messages
    lack: str = "no caption"  # the message if the caption field holds no text
    size: tuple[int, int] | None = None  # height and width in pixels, if the source has them
    problem: str | None = None  # why it cannot be used, if already known


class Fields:
    """The caption fields that a scan wants, and the names of all caption fields that its source was found to have."""

    def __init__(self, asked: Collection[str] | None = None):
        """
        Args:
            asked: the fields to read; by default the usual ones.
        """
        self.asked = asked is not None
        self.wanted = CAPTION_COLUMNS if asked is None else tuple(asked)
        self.seen: set[str] = set()
        self._told: dict[str, list[str]] = defaultdict(list)

    def tell(self, what: str, name: str) -> None:
        """Note that `what` holds for the file `name`, for the report of the scan."""
        self._told[what].append(name)

    @property
    def notes(self) -> list[str]:
        """What was told, as lines with the number of files and the first of them."""
        return [
            f"{len(names)} {what}: {', '.join(names[:3])}{', …' if len(names) > 3 else ''}"
            for what, names in self._told.items()
        ]

    def decode(self, data: bytes, name: str) -> str:
        """The text of the file `name`; encodings other than UTF-8 are told. Raises ValueError as `decode_text`."""
        text, encoding = decode_text(data)
        if encoding != "UTF-8":
            self.tell(f"texts are in {encoding}, not UTF-8", name)
        return text

    def take(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """The wanted fields of a row; all fields that hold text are recorded in `seen`, wanted or not."""
        self.seen.update(
            name
            for name, value in row.items()
            if name in self.wanted or isinstance(value, (str, list)) or value is None
        )
        return {name: row[name] for name in self.wanted if name in row}
