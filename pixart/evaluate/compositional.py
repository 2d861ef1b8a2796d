"""How often a model draws combinations of the compositional set right, held-out ones and those seen in training.

A drawn image counts as right if the nearest of all 1,440 real images, by Euclidean distance of 8-bit pixels, is the one
asked for. Identical real images are one class, since some emoji do not show tone or gender.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from pixart.contact_sheet import contact_sheet
from pixart.data.compositional import GENDERS, HELD_OUT, TONES, combinations
from pixart.data.compositional_parts import TAUGHT
from pixart.data.openmoji import ATTRIBUTION
from pixart.errors import InputError
from pixart.evaluate.image_metric import ImageMetric, Rows, Task
from pixart.evaluate.interval import Estimate, rate_estimate
from pixart.evaluate.metric import Declaration, Score
from pixart.evaluate.nearest import NearestImage
from pixart.evaluate.reference import read_images
from pixart.files import digest_text, read_lines, to_json

CHANCE = 1 / (len(GENDERS) * len(TONES))  # probability of guessing the combination of a known activity
ASPECTS = ("activity", "gender", "tone")
SHOWN = 24  # held-out combinations on the sheet


@dataclass(frozen=True)
class Cell:
    """A combination: its real image, caption and attributes."""

    file: Path
    caption: str
    attributes: tuple[str, str, str]  # by ASPECTS
    held_out: bool


def read_cells(folder: Path) -> list[Cell]:
    """All combinations of a folder that `data.prepare: compositional` or `tones` made, ordered by their file names.

    Raises:
        InputError: it is not such a folder.
    """
    cells = []
    taught = [folder / TAUGHT] if (folder / TAUGHT).is_dir() else []
    for part in (folder, folder / HELD_OUT, *taught):
        path = part / "metadata.jsonl"
        if not path.is_file():
            raise InputError(
                f"compositional: {folder} has no {path.relative_to(folder)}; expected the folder that data.prepare: "
                "compositional made"
            )
        for _, row in read_lines(path):
            if not any(name in row for name in ASPECTS):
                continue  # an emoji outside the combinations, in the set of all emoji
            try:
                attributes = tuple(row[name] for name in ASPECTS)
                cells.append(Cell(part / row["file_name"], row["text"], attributes, part == folder / HELD_OUT))
            except KeyError as error:
                raise InputError(f"compositional: {path}: a row has no {error}; make the folder anew") from None
    if not cells:
        raise InputError(
            f"compositional: no row of {folder} has {', '.join(ASPECTS)}; expected the folder that data.prepare: "
            "compositional made"
        )
    return sorted(cells, key=lambda cell: cell.file.stem)


class Compositional(ImageMetric):
    """Rates of combinations drawn right, held out and seen in training."""

    declaration = Declaration(
        (
            Score("compositional", "combinations never seen in training, drawn right", "higher"),
            *(Score(f"compositional_{a}", "their attributes", "higher", part=a) for a in ASPECTS),
            Score("compositional_seen", "combinations seen in training, drawn right", "higher"),
        ),
        needs=("images",),
    )

    name = "compositional"
    legend = "real images above, drawn ones below; a red caption is a miss"

    @classmethod
    def own_prompts(cls, reference: Path | None) -> list[str]:
        known = reference is not None and (reference / "metadata.jsonl").is_file()
        return [cell.caption for cell in (read_cells(reference) if known else combinations())]

    def open(self, task: Task) -> None:
        super().open(task)
        self.cells = read_cells(task.needed_reference(self.name))
        numbers = {cell.caption: i for i, cell in enumerate(self.cells)}
        self.asked = [numbers.get(prompt) for prompt in task.needed_prompts(self.name)]
        if None in self.asked:
            stranger = task.items[self.asked.index(None)].prompt
            raise InputError(f"{self.name}: '{stranger}' is no caption of the set; leave --prompts out to draw them")
        images = read_images([cell.file for cell in self.cells], task.size, "crop", "reference")
        self.real = NearestImage(images)
        self.classes = self.real.classes
        seen = {c for c, cell in zip(self.classes, self.cells, strict=True) if not cell.held_out}
        self.new = np.array([c not in seen for c in self.classes])  # classes without a training combination
        self.digest = digest_text(to_json([cell.caption for cell in self.cells])) + f", {self.real.count} classes"

    def rows(self) -> Mapping[str, Rows]:
        return {"compositional": self.nearest}

    def nearest(self, images: np.ndarray, numbers: Sequence[int]) -> np.ndarray:
        """The class of the nearest real image, (B,)."""
        return self.real.find(images)

    def hits(self, rows: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Whether each image is right: the whole combination, and each attribute."""
        nearest = rows["compositional"]
        found = {"combination": nearest == self.classes[self.asked]}
        for aspect, name in enumerate(ASPECTS):
            of = [set() for _ in range(self.real.count)]  # the attribute values of each class
            for c, cell in zip(self.classes, self.cells, strict=True):
                of[c].add(cell.attributes[aspect])
            pairs = zip(self.asked, nearest, strict=True)
            found[name] = np.array([self.cells[i].attributes[aspect] in of[c] for i, c in pairs])
        return found

    def estimate(self, rows: Mapping[str, np.ndarray]) -> dict[str, Estimate]:
        hits, new = self.hits(rows), self.new[self.asked]
        seen = ~np.array([self.cells[i].held_out for i in self.asked])

        def rate(name: str, chosen: np.ndarray) -> Estimate:
            return rate_estimate(hits[name][chosen], self.task.clusters[chosen])

        return {
            "compositional": rate("combination", new),
            **{f"compositional_{name}": rate(name, new) for name in ASPECTS},
            "compositional_seen": rate("combination", seen),
            **{f"compositional_seen_{name}": rate(name, seen) for name in ASPECTS},
        }

    def facts(self) -> dict[str, Any]:
        new, held = int(self.new[self.asked].sum()), sum(self.cells[i].held_out for i in self.asked)
        return {"set": self.digest, "held_out": new, "seen": len(self.asked) - held}

    def shown(self) -> Sequence[int]:
        """Held-out combinations, evenly spaced over all of them."""
        new = np.flatnonzero(self.new[self.asked])
        return [int(new[i * len(new) // SHOWN]) for i in range(SHOWN)] if len(new) > SHOWN else [*map(int, new)]

    def sheet(self, images: Mapping[int, np.ndarray], rows: Mapping[str, np.ndarray]) -> Image.Image | None:
        """The real image on top, the drawn one below; the caption of a miss is red."""
        if not images:
            return None
        numbers, hits = sorted(images), self.hits(rows)["combination"]
        cells = [self.cells[self.asked[i]] for i in numbers]
        real = read_images([cell.file for cell in cells], self.task.size, "crop", "reference")
        pairs = [(Image.fromarray(r), Image.fromarray(images[i])) for r, i in zip(real, numbers, strict=True)]
        misses = [place for place, i in enumerate(numbers) if not hits[i]]
        sheet = contact_sheet(pairs, [cell.caption for cell in cells], columns=8, red=misses)
        sheet.info["Comment"] = ATTRIBUTION
        return sheet

    def summary(self, estimates: Mapping[str, Estimate]) -> str | None:
        facts, new, seen = self.facts(), estimates["compositional"], estimates["compositional_seen"]
        parts = ", ".join(f"{name} {100 * estimates[f'compositional_{name}'].value:.0f} %" for name in ASPECTS)
        return (
            f"never seen in training: {new.percent()} of {facts['held_out']} combinations drawn "
            f"right (chance {100 * CHANCE:.0f} %); {parts}\n"
            f"seen in training: {100 * seen.value:.1f} % of {facts['seen']}"
        )
