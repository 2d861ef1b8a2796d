"""What every source tells of its pictures before anybody has looked at one: ids, places, caption fields."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from pixart.data.images import Picture

CAPTION_COLUMNS = ("text", "caption", "captions", "prompt")  # where captions are looked for if nobody says where


@dataclass(frozen=True)
class Item:
    """A picture as its source tells of it."""

    id: str
    picture: Picture | None  # None only with a problem
    fields: dict[str, Any]  # caption field → what the source has there, unchecked
    place: str  # where the source tells it, for errors
    lack: str = "no caption"  # what to say if the caption field holds no text
    size: tuple[int, int] | None = None  # height and width in pixels, if the source tells them
    problem: str | None = None  # why it cannot be used, if that is known already


class Fields:
    """The caption fields that a scan wants, and the names of all that its source turned out to have."""

    def __init__(self, asked: Collection[str] | None = None):
        """
        Args:
            asked: the fields to read; the usual ones if nobody says.
        """
        self.asked = asked is not None
        self.wanted = CAPTION_COLUMNS if asked is None else tuple(asked)
        self.seen: set[str] = set()

    def take(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """The wanted ones of a row; notes those that hold text, wanted or not."""
        self.seen.update(
            name
            for name, value in row.items()
            if name in self.wanted or isinstance(value, (str, list)) or value is None
        )
        return {name: row[name] for name in self.wanted if name in row}


def inside(path: Any, what: str) -> PurePosixPath:
    """`path` if it is the text of a path that stays within a folder; `what` names it in the error.

    Raises:
        ValueError: it is not.
    """
    if not isinstance(path, str) or not path:
        raise ValueError(f"{what} is {path!r}, expected a path within the folder")
    name = PurePosixPath(path)
    if name.is_absolute() or ".." in name.parts:
        raise ValueError(f"'{name}' leads out of the folder; expected a path within it")
    return name
