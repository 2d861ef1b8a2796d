"""A complete factorial set: 80 activities × 3 genders × 6 skin tones of OpenMoji, a fifth of the combinations held out.

Every activity, gender and tone occurs in training, so a model that draws held-out combinations has learnt to combine
them; it cannot have memorised them. `pixart.evaluate.compositional` scores that.

Emoji designed by OpenMoji, CC BY-SA 4.0.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path

from pixart.data.openmoji import SKIN_TONES, named_emoji, render_emoji

TONES = ("none", "light", "medium-light", "medium", "medium-dark", "dark")
GENDERS = ("person", "man", "woman")
HELD_OUT = "held_out"  # the subfolder of the held-out combinations
_GENDER_OF = {
    "person": "person",
    "people": "person",
    "man": "man",
    "men": "man",
    "woman": "woman",
    "women": "woman",
}
# nine combinations are drawn twice, with a person and as hair or tone alone; the drawing with the person is used except
# for these
_WITHOUT_PERSON = {"1F9B1", "1F9B3", "1F3FC", "1F3FD", "1F3FE", "1F3FF"}
_PERSON = "1F9D1"


@dataclass(frozen=True)
class Combination:
    svg: Path
    caption: str
    activity: str  # the name without its words for gender and tone; "" is the person alone
    gender: str  # one of GENDERS
    tone: str  # one of TONES

    @property
    def held_out(self) -> bool:
        """Whether it is held out from training; depends only on the combination, by SHA-256."""
        return int(self.digest(), 16) % 5 == 0

    def digest(self, purpose: str = "") -> str:
        """SHA-256 of the combination, another one for every purpose, to choose combinations by."""
        return hashlib.sha256(f"{purpose}{self.activity}|{self.gender}|{self.tone}".encode()).hexdigest()


def combinations() -> list[Combination]:
    """All 1,440 combinations, ordered by file name: of the activities that are drawn for every gender and tone."""
    return _find()[0]


def _find() -> tuple[list[Combination], list[Path]]:
    """The combinations, and the second drawings of some of them, which are left out."""
    found: dict[str, dict[tuple[str, str], Combination]] = {}
    second: list[Path] = []
    for points, svg, caption in named_emoji():
        tones = [TONES[1 + point - SKIN_TONES.start] for point in points if point in SKIN_TONES]
        if len(tones) > 1:
            continue
        tone = tones[0] if tones else "none"
        words = caption.replace(f"{tone} skin tone", "").split()
        genders = [_GENDER_OF[word] for word in words if word in _GENDER_OF]
        if len(genders) > 1:
            continue
        activity = " ".join(word for word in words if word not in _GENDER_OF)
        new = Combination(svg, caption, activity, genders[0] if genders else "person", tone)
        cells = found.setdefault(activity, {})
        if (old := cells.get((new.gender, tone))) is not None:
            new, other = _choose(old, new)
            second.append(other.svg)
        cells[new.gender, tone] = new
    whole = [cells for cells in found.values() if len(cells) == len(GENDERS) * len(TONES)]
    return sorted((cell for cells in whole for cell in cells.values()), key=lambda cell: cell.svg.stem), second


def _choose(a: Combination, b: Combination) -> tuple[Combination, Combination]:
    """Of two drawings of one combination, the one that belongs to the set, and the other one."""
    with_person, alone = (a, b) if a.svg.stem.startswith(_PERSON) else (b, a)
    return (alone, with_person) if alone.svg.stem in _WITHOUT_PERSON else (with_person, alone)


def build_compositional(folder: str | Path, *, side: int = 72) -> Path:
    """Render the set as side × side PNGs on white, unless it already exists.

    `folder` is a data set of the 1,132 training combinations, its subfolder `held_out` a data set of the other 308.
    Each row of their `metadata.jsonl` has `text`, `activity`, `gender` and `tone`.

    Raises:
        InputError: a package of the extra `openmoji` is not installed, or `folder` holds something else.
    """

    return render_emoji(folder, lambda: [*map(combination_row, combinations())], side=side)


def build_openmoji_all(folder: str | Path, *, side: int = 72) -> Path:
    """Render every OpenMoji that has a name, unless `folder` already exists, with the same combinations held out.

    `folder` holds the 1,132 training combinations and all other emoji, its subfolder `held_out` is that of
    `build_compositional`. Rows of other emoji have only `text`. Second drawings of combinations are left out, since
    they would show what is held out.

    Raises:
        InputError: as `build_compositional`.
    """

    def rows() -> list[tuple[Path, str, dict]]:
        cells, second = _find()
        known = {cell.svg for cell in cells} | set(second)
        others = [(svg, "", {"text": caption}) for _, svg, caption in named_emoji() if svg not in known]
        return sorted([*map(combination_row, cells), *others], key=lambda row: row[0].stem)

    return render_emoji(folder, rows, side=side)


def combination_row(cell: Combination, subfolder: str | None = None) -> tuple[Path, str, dict]:
    """A combination as `render_emoji` takes it; by default held-out ones have a subfolder of their own."""
    if subfolder is None:
        subfolder = HELD_OUT if cell.held_out else ""
    attributes = {"activity": cell.activity, "gender": cell.gender, "tone": cell.tone}
    return cell.svg, subfolder, {"text": cell.caption, **attributes}
