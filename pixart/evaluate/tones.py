"""Whether an adapter teaches two skin tones and leaves the rest as it was, on the set of `data.prepare: tones`."""

from collections.abc import Mapping

import numpy as np

from pixart.data.compositional_parts import NEW_TONES, TAUGHT
from pixart.errors import InputError
from pixart.evaluate.compositional import ASPECTS, Compositional
from pixart.evaluate.image_metric import Task
from pixart.evaluate.interval import Estimate, rate_estimate
from pixart.evaluate.metric import Declaration, Score


class Tones(Compositional):
    """Rates of combinations drawn right that no training has seen: of the two new tones, and of the other four."""

    declaration = Declaration(
        (
            Score("tones_new", "unseen combinations of the two new tones, drawn right", "higher"),
            *(Score(f"tones_new_{a}", "attributes, new tones", "higher", part=a) for a in ASPECTS),
            Score("tones_rest", "unseen combinations of the other tones, drawn right", "higher"),
            *(Score(f"tones_rest_{a}", "attributes, other tones", "higher", part=a) for a in ASPECTS),
        ),
        needs=("images",),
    )
    name = "tones"

    def open(self, task: Task) -> None:
        folder = task.needed_reference(self.name)
        if not (folder / TAUGHT).is_dir():
            raise InputError(f"tones: {folder} has no {TAUGHT}; expected the folder that data.prepare: tones made")
        super().open(task)

    def estimate(self, rows: Mapping[str, np.ndarray]) -> dict[str, Estimate]:
        hits, unseen = self.hits(rows), self.new[self.asked]
        taught = np.array([self.cells[i].attributes[ASPECTS.index("tone")] in NEW_TONES for i in self.asked])
        found = {}
        for key, chosen in (("tones_new", unseen & taught), ("tones_rest", unseen & ~taught)):
            for name, hit in hits.items():
                part = key if name == "combination" else f"{key}_{name}"
                found[part] = rate_estimate(hit[chosen], self.task.clusters[chosen])
        return found

    def facts(self) -> dict[str, object]:
        return {"set": self.digest, "unseen": int(self.new[self.asked].sum())}

    def summary(self, estimates: Mapping[str, Estimate]) -> str | None:
        new, rest = (estimates[f"tones_{which}"].percent() for which in ("new", "rest"))
        return f"unseen combinations drawn right: {new} of the tones {' and '.join(NEW_TONES)}, {rest} of the others"
