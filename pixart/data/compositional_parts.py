"""The compositional set divided for experiments with adapters: two skin tones to teach, or one subject to teach.

Emoji designed by OpenMoji, CC BY-SA 4.0. The subject is one of them with another skin colour.
"""

import tempfile
from pathlib import Path

from pixart.data.compositional import HELD_OUT, Combination, combination_row, combinations
from pixart.data.openmoji import render_emoji
from pixart.errors import InputError

NEW_TONES = ("light", "medium-dark")  # each lies between two of the other four
TAUGHT, TAUGHT_PER_TONE = "new_tones", 20  # the subfolder of the images that teach them, and how many of each tone

WHOLE_SET = "set"  # the subfolder of the compositional set beside the subject
CLASS_ACTIVITY = "firefighter"
CLASS_PROMPT, INSTANCE_PROMPT = "firefighter", "sks firefighter"
_SKIN, _SUBJECT_SKIN = "#FCEA2B", "#5CB85C"  # OpenMoji's yellow; the subject is green
# where the subject stands in the drawing's 72 units; 32 pixels make one of them half a pixel
_SHIFTS = ((0, 0), (-3, 0), (3, 0), (0, -3), (0, 3), (-3, 3), (3, -3), (2, 2))


def taught_combinations() -> list[Combination]:
    """The combinations that teach the new tones: 20 of each, chosen by SHA-256 among those not held out."""
    cells = sorted((c for c in combinations() if not c.held_out), key=lambda cell: cell.digest("taught|"))
    return [cell for tone in NEW_TONES for cell in [c for c in cells if c.tone == tone][:TAUGHT_PER_TONE]]


def build_tones(folder: str | Path, *, side: int = 72) -> Path:
    """Render the set for teaching two skin tones as side × side PNGs on white, unless it already exists.

    `folder` is a data set of the training combinations of four tones, its subfolder `new_tones` of twenty of each of
    the other two, and `held_out` of everything else.

    Raises:
        InputError: as `pixart.data.compositional.build_compositional`.
    """

    def rows() -> list[tuple[Path, str, dict]]:
        taught = set(taught_combinations())

        def part(cell: Combination) -> str:
            if cell in taught:
                return TAUGHT
            return HELD_OUT if cell.held_out or cell.tone in NEW_TONES else ""

        return [combination_row(cell, part(cell)) for cell in combinations()]

    return render_emoji(folder, rows, side=side)


def build_subject(folder: str | Path, *, side: int = 72) -> Path:
    """Render a subject to teach as side × side PNGs on white, unless it already exists: eight images of one firefighter
    with green skin, each at another place.

    `folder` is a data set of them, its subfolder `set` is the compositional set.

    Raises:
        InputError: as `pixart.data.compositional.build_compositional`.
    """
    with tempfile.TemporaryDirectory() as drawings:

        def rows() -> list[tuple[Path, str, dict]]:
            cells = combinations()
            drawing = next(cell for cell in cells if cell.caption == CLASS_PROMPT).svg.read_text(encoding="utf-8")
            if _SKIN not in drawing.upper() or 'viewBox="0 0 72 72"' not in drawing:
                raise InputError(
                    f"prepare: OpenMoji's drawing of '{CLASS_PROMPT}' has no skin of colour {_SKIN} in a square of 72 "
                    "units; install the version that the extra openmoji names"
                )
            subject = []
            for number, (x, y) in enumerate(_SHIFTS):
                path = Path(drawings) / f"subject-{number}.svg"
                green = drawing.replace(_SKIN, _SUBJECT_SKIN).replace(_SKIN.lower(), _SUBJECT_SKIN)
                path.write_text(green.replace('"0 0 72 72"', f'"{-x} {-y} 72 72"'), encoding="utf-8")
                subject.append((path, "", {"text": INSTANCE_PROMPT}))
            parts = [WHOLE_SET + f"/{HELD_OUT}" * cell.held_out for cell in cells]
            return subject + [combination_row(cell, part) for cell, part in zip(cells, parts, strict=True)]

        return render_emoji(folder, rows, side=side)
