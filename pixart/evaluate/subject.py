"""What DreamBooth has taught and what it has spoilt, on the set of `data.prepare: subject`."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pixart.data.compositional import combinations
from pixart.data.compositional_parts import CLASS_ACTIVITY, CLASS_PROMPT, INSTANCE_PROMPT, WHOLE_SET
from pixart.errors import InputError
from pixart.evaluate.compositional import read_cells
from pixart.evaluate.image_metric import ImageMetric, Rows, Task
from pixart.evaluate.interval import Estimate, rate_estimate
from pixart.evaluate.metric import Declaration, Score
from pixart.evaluate.nearest import NearestImage
from pixart.evaluate.reference import read_images

DRAWS = 24  # of the instance's and of the class's prompt
DRAWS_OF_CLASS = 3  # of every other caption of the class
SUBJECT = -1  # the class of the subject's images


class SubjectScores(ImageMetric):
    """Rates of images drawn right: of the subject, of its class by the class's prompt and by the class's other
    captions, and of other classes. Right is as in `Compositional`, with the subject's images as one class more.

    A spoilt class draws the subject where its prompt asks for the class.
    """

    declaration = Declaration(
        (
            Score("subject", "the subject, drawn right", "higher"),
            Score("subject_class", "the class prompt, drawn right", "higher"),
            Score("subject_family", "other captions of the class, drawn right", "higher"),
            Score("subject_others", "captions of other classes, drawn right", "higher"),
        ),
        needs=("images",),
    )

    @classmethod
    def own_prompts(cls, reference: Path | None) -> list[str]:
        family = [c.caption for c in combinations() if c.activity == CLASS_ACTIVITY and c.caption != CLASS_PROMPT]
        others = [c.caption for c in combinations() if c.activity != CLASS_ACTIVITY][::15]
        return [INSTANCE_PROMPT] * DRAWS + [CLASS_PROMPT] * DRAWS + family * DRAWS_OF_CLASS + others

    def open(self, task: Task) -> None:
        super().open(task)
        folder = task.needed_reference("subject")
        if not (folder / WHOLE_SET).is_dir():
            raise InputError(
                f"subject: {folder} has no {WHOLE_SET}; expected the folder that data.prepare: subject made"
            )
        cells = read_cells(folder / WHOLE_SET)
        numbers = {cell.caption: number for number, cell in enumerate(cells)}
        prompts = task.needed_prompts("subject")
        if strangers := [prompt for prompt in prompts if prompt != INSTANCE_PROMPT and prompt not in numbers]:
            raise InputError(f"subject: '{strangers[0]}' is no caption of the set; leave --prompts out to draw them")
        files = [cell.file for cell in cells]
        images = read_images(files, task.size, "crop", "reference")
        subject = read_images(sorted(folder.glob("*.png")), task.size, "crop", "reference")
        self.real = NearestImage(np.concatenate([images, subject]))
        classes, self.subject = np.split(self.real.classes, [len(images)])
        self.asked = np.array([SUBJECT if p == INSTANCE_PROMPT else classes[numbers[p]] for p in prompts])
        activities = [None if p == INSTANCE_PROMPT else cells[numbers[p]].attributes[0] for p in prompts]
        of_class = np.array([activity == CLASS_ACTIVITY for activity in activities])
        by_class = np.array([prompt == CLASS_PROMPT for prompt in prompts])
        self.parts = {
            "subject": self.asked == SUBJECT,
            "subject_class": by_class,
            "subject_family": of_class & ~by_class,
            "subject_others": ~of_class & (self.asked != SUBJECT),
        }

    def rows(self) -> Mapping[str, Rows]:
        return {"subject": self.nearest}

    def nearest(self, images: np.ndarray, numbers: Sequence[int]) -> np.ndarray:
        """The class of the nearest real image, (B,)."""
        found = self.real.find(images)
        return np.where(np.isin(found, self.subject), SUBJECT, found)

    def estimate(self, rows: Mapping[str, np.ndarray]) -> dict[str, Estimate]:
        hits, clusters = rows["subject"] == self.asked, self.task.clusters
        return {key: rate_estimate(hits[part], clusters[part]) for key, part in self.parts.items()}

    def facts(self) -> dict[str, Any]:
        return {key: int(part.sum()) for key, part in self.parts.items()}

    def summary(self, estimates: Mapping[str, Estimate]) -> str | None:
        rates = [estimates[score.key].percent() for score in self.declaration.scores]
        return "drawn right: subject {}, class prompt {}, other captions of the class {}, others {}".format(*rates)
