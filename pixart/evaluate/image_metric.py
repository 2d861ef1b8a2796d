"""The contract of metrics of drawn images: a metric keeps a few numbers per image and computes its scores from them."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from pixart.errors import InputError
from pixart.evaluate.features import Extractor, load_extractor
from pixart.evaluate.interval import Estimate, assign_groups
from pixart.evaluate.metric import Metric
from pixart.evaluate.reference import Fit, Statistics, reference_statistics
from pixart.evaluate.resize import Filter

# images (B, H, W, 3) uint8 and their numbers in the whole set → (B, …)
Rows = Callable[[np.ndarray, Sequence[int]], np.ndarray]


@dataclass(frozen=True)
class Item:
    """An image to be scored."""

    prompt: str | None  # None for images of unknown prompts
    seed: int | None  # None for images from elsewhere
    cluster: int  # the number of its prompt; intervals must not treat images of one prompt as independent


def number_prompts(prompts: Sequence[str], seed: int = 0) -> list[Item]:
    """One image for every prompt; the first has `seed`, each other one more. Equal prompts belong together."""
    pairs = zip(prompts, together(prompts), strict=True)
    return [Item(prompt, seed + i, first) for i, (prompt, first) in enumerate(pairs)]


def together(prompts: Sequence[str | None]) -> list[int]:
    """The cluster of every image: the number of the first with the same prompt, its own if the prompt is unknown."""
    first = {prompt: i for i, prompt in reversed(list(enumerate(prompts)))}
    return [i if prompt is None else first[prompt] for i, prompt in enumerate(prompts)]


@dataclass
class Task:
    """What a metric receives before any image is drawn."""

    items: Sequence[Item]
    size: tuple[int, int]  # height and width of the images
    device: torch.device
    reference: Path | None = None
    fit: Fit = "exact"
    filter: Filter = "clean"
    cache: Path = Path("references")
    inception: str | None = None
    truncate: bool = False  # truncate prompts that are too long for CLIP
    say: Callable[[str], None] = print
    _extractors: dict[str, Extractor] = field(default_factory=dict)
    _statistics: dict[str, Statistics] = field(default_factory=dict)

    def extractor(self, name: str) -> Extractor:
        """The feature extractor of that name, loaded once for all metrics."""
        if name not in self._extractors:
            self._extractors[name] = load_extractor(name, self.device, self.inception)
        return self._extractors[name]

    def statistics(self, name: str, metric: str) -> Statistics:
        """The reference's features by that extractor."""
        if name not in self._statistics:
            source = self.needed_reference(metric)
            known = self.extractor(name), self.filter, self.size, self.fit, self.cache
            self._statistics[name] = reference_statistics(source, *known)
        return self._statistics[name]

    def needed_reference(self, metric: str) -> Path:
        if self.reference is None:
            raise InputError(f"{metric} compares with real images: give --reference FOLDER")
        return self.reference

    def needed_prompts(self, metric: str) -> list[str]:
        if any(item.prompt is None for item in self.items):
            raise InputError(f"{metric} compares images with their prompts: give them with --prompts or --data")
        return [item.prompt for item in self.items]

    @cached_property
    def clusters(self) -> np.ndarray:
        """The cluster of every image."""
        return np.array([item.cluster for item in self.items])

    @cached_property
    def groups(self) -> np.ndarray:
        """The group of every image, for intervals."""
        return assign_groups(self.clusters.tolist())


class ImageMetric(Metric):
    """Base class of metrics of drawn images, registered like any metric, with `needs=("images",)`.

    `open` is called before anything is drawn, then the functions of `rows` for every image, in any order and process,
    and finally `estimate` with the rows of all images in order.
    """

    @classmethod
    def own_prompts(cls, reference: Path | None) -> list[str]:
        """The prompts of which images are drawn when none are given; none if they must be given."""
        return []

    def open(self, task: Task) -> None:
        """Load models and references, and refuse a task that cannot be scored.

        Raises:
            InputError: a file is missing, or images, prompts or reference do not fit.
        """
        self.task = task

    def rows(self) -> Mapping[str, Rows]:
        """The functions that compute what is kept of every image, by name; metrics share those of equal names."""
        raise NotImplementedError(f"{type(self).__name__} has no rows")

    def estimate(self, rows: Mapping[str, np.ndarray]) -> dict[str, Estimate]:
        """All declared scores; it may return further numbers."""
        raise NotImplementedError(f"{type(self).__name__} has no estimate")

    legend = ""  # what `sheet` shows, for the line that names its file

    def shown(self) -> Sequence[int]:
        """Numbers of the images that `sheet` shows; they are kept until the end."""
        return ()

    def sheet(self, images: Mapping[int, np.ndarray], rows: Mapping[str, np.ndarray]) -> Image.Image | None:
        """A contact sheet of the images of `shown`, given as number → (H, W, 3) uint8; `rows` as in `estimate`."""
        return None

    def summary(self, estimates: Mapping[str, Estimate]) -> str | None:
        """A few lines of text about the result of `estimate`."""
        return None

    def facts(self) -> dict[str, Any]:
        """What the scores depend on besides the images; scores with different facts cannot be compared."""
        return {}


def what_to_keep(metrics: Iterable[ImageMetric]) -> tuple[dict[str, Rows], set[int]]:
    """How the rows of all metrics are made, by name, and the numbers of the images that their sheets show."""
    metrics = list(metrics)
    makers = {name: make for metric in metrics for name, make in metric.rows().items()}
    return makers, {number for metric in metrics for number in metric.shown()}
