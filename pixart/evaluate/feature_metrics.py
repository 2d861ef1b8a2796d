"""Scores that compare features of images with those of real ones: FID and other Fréchet distances, KID, PRDC."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from pixart.errors import InputError
from pixart.evaluate.frechet import finite_bias, frechet_estimate
from pixart.evaluate.image_metric import ImageMetric, Rows, Task
from pixart.evaluate.interval import Estimate
from pixart.evaluate.kid import kid_estimate
from pixart.evaluate.metric import Declaration, Score
from pixart.evaluate.prdc import NEAREST_DENSITY, prdc


class FeatureMetric(ImageMetric):
    """Base class; the argument of a metric, as in `frechet:MODEL`, names another network than Inception."""

    label = "features"
    least = 2  # smallest number of images

    def __init__(self, model: str = "inception"):
        self.model = model

    def open(self, task: Task) -> None:
        super().open(task)
        if len(task.items) < self.least:
            count = len(task.items)
            raise InputError(f"{self.label}: got {count} image{'s' * (count != 1)}, expected at least {self.least}")
        self.extractor = task.extractor(self.model)
        self.reference = task.statistics(self.model, self.label)

    def rows(self) -> Mapping[str, Rows]:
        return {f"features:{self.model}": lambda images, _: self.extractor(images, self.task.filter)}

    def features(self, rows: Mapping[str, np.ndarray]) -> np.ndarray:
        return rows[f"features:{self.model}"]

    def real(self) -> np.ndarray:
        """The reference's features.

        Raises:
            InputError: only its mean and covariance are known.
        """
        if self.reference.features is None:
            raise InputError(f"{self.label} compares image with image: give --reference a folder of images, no .npz")
        return self.reference.features

    def facts(self) -> dict[str, Any]:
        return {
            "extractor": self.extractor.name,
            "extractor_weights": self.extractor.weights,
            "filter": self.task.filter,
            "reference": self.reference.hash,
            "reference_images": self.reference.count,
        }


class Frechet(FeatureMetric):
    """The Fréchet distance between features of any network; called FID only with Inception."""

    def __init__(self, model: str):
        super().__init__(model)
        self.key = "fid" if model == "inception" else f"frechet_{model.partition('=')[0].rstrip('/').split('/')[-1]}"
        self.label = "FID" if model == "inception" else f"Fréchet distance of {model}"
        self.declaration = Declaration((Score(self.key, self.label, "lower"),), needs=("images",))

    def open(self, task: Task) -> None:
        super().open(task)
        count, size = len(task.items), self.extractor.size
        if count <= size:
            bias = finite_bias(self.reference.moments, count)
            task.say(
                f"warning: {self.label} of {count} images with {size} features: so few score about {bias:.4g} even if "
                f"they are as the reference; compare with scores of {count} images only, or take more than {size}"
            )

    def estimate(self, rows: Mapping[str, np.ndarray]) -> dict[str, Estimate]:
        return {self.key: frechet_estimate(self.features(rows), self.reference.moments, self.task.groups)}


class FID(Frechet):
    """FID (Heusel et al. 2017): Inception features with the weights of the original TensorFlow graph."""

    declaration = Declaration((Score("fid", "FID", "lower"),), needs=("images",))

    def __init__(self):
        super().__init__("inception")


class KID(FeatureMetric):
    """Kernel Inception distance; `kid:MODEL` uses another network than Inception."""

    label = "KID"

    def __init__(self, model: str = "inception"):
        super().__init__(model)
        self.key = "kid" if model == "inception" else f"kid_{model.partition('=')[0].rstrip('/').split('/')[-1]}"
        self.declaration = Declaration((Score(self.key, self.key.replace("_", " of "), "lower"),), needs=("images",))

    def open(self, task: Task) -> None:
        super().open(task)
        self.real()

    def estimate(self, rows: Mapping[str, np.ndarray]) -> dict[str, Estimate]:
        return {self.key: kid_estimate(self.features(rows), self.real(), self.task.groups)}


class PRDC(FeatureMetric):
    """Improved precision and recall, density and coverage; `prdc:MODEL` uses another network than Inception."""

    label = "precision and recall"
    least = NEAREST_DENSITY + 1

    def __init__(self, model: str = "inception"):
        super().__init__(model)
        names = ("precision", "recall", "density", "coverage")
        self.declaration = Declaration(tuple(Score(name, name, "higher") for name in names), needs=("images",))

    def open(self, task: Task) -> None:
        super().open(task)
        if len(self.real()) < self.least:
            raise InputError(
                f"{self.label}: the reference has {len(self.real())} images, expected {self.least} or more"
            )

    def estimate(self, rows: Mapping[str, np.ndarray]) -> dict[str, Estimate]:
        return prdc(self.features(rows), self.real(), self.task.groups)
