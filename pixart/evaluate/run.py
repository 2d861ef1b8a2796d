"""Scores many images on any number of processes; the rows of a batch are written before the next batch is drawn.

Each batch is one file of rows. Processes divide the batches by number and do not wait for each other; the one that
finds all files complete writes the record. A kill therefore loses at most one batch, and the same call resumes.
"""

import io
import json
import resource
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from pixart.device import resident
from pixart.errors import InputError
from pixart.evaluate.image_metric import ImageMetric, Item, Task, what_to_keep
from pixart.evaluate.record import SCORES, describe_task, make_record
from pixart.evaluate.reference import hash_images, image_sizes, read_images
from pixart.files import locked, write_file, write_json, write_png
from pixart.inference.pipeline import Pipeline
from pixart.inference.records import common_record
from pixart.inference.request import Request
from pixart.provenance import revision, versions

PLAN = "plan.json"
AHEAD = 4  # number of batches whose prompts are encoded together


class Drawer(Protocol):
    """A source of images."""

    def describe(self) -> dict[str, Any]:
        """Everything that the pixels depend on besides prompts, seeds and size."""

    def draw(self, batches: Iterable[Sequence[int]]) -> Iterator[np.ndarray]:
        """The images (B, H, W, 3) uint8 of each batch of image numbers, one batch after the other."""


@dataclass(frozen=True)
class ByModel:
    """Images that a pipeline draws."""

    pipeline: Pipeline
    items: Sequence[Item]
    size: tuple[int, int]
    batch_size: int
    null: str | None = None
    truncate: bool = False

    def describe(self) -> dict[str, Any]:
        return common_record(self.pipeline, self.pipeline.settings(None), self.null)

    def draw(self, batches: Iterable[Sequence[int]]) -> Iterator[np.ndarray]:
        batches = list(batches)  # only the very last is not full, so the stream forms the same batches
        requests = (
            Request(self.items[i].prompt, self.items[i].seed, height=self.size[0], width=self.size[1])
            for batch in batches
            for i in batch
        )
        options = {"batch_size": self.batch_size, "look_ahead": AHEAD * self.batch_size}
        drawn = self.pipeline.stream(requests, null=self.null, truncate=self.truncate, **options)
        for batch in batches:
            yield np.stack([np.asarray(next(drawn).image) for _ in batch])


@dataclass(frozen=True)
class FromFolder:
    """Existing images in files."""

    paths: Sequence[Path]
    size: tuple[int, int]

    def describe(self) -> dict[str, Any]:
        return {"files": hash_images(list(self.paths))}

    def draw(self, batches: Iterable[Sequence[int]]) -> Iterator[np.ndarray]:
        for batch in batches:
            yield read_images([self.paths[i] for i in batch], self.size, "exact", "image")


def common_size(paths: Sequence[Path]) -> tuple[int, int]:
    """The common (height, width) of all images.

    Raises:
        InputError: their sizes differ.
    """
    sizes = image_sizes(list(paths))
    first, size = next(sizes)
    for path, other in sizes:
        if other != size:
            raise InputError(
                f"{path} has {other[1]}×{other[0]} px (width × height), {first.name} {size[1]}×{size[0]}; "
                "a score is of images of one size: resize them, or score each size by itself"
            )
    return size


@dataclass
class Evaluation:
    """The scoring of one set of images, in a separate folder."""

    folder: Path
    task: Task
    metrics: Mapping[str, ImageMetric]
    drawer: Drawer
    batch_size: int = 16
    protocol: str | None = None
    keep: Callable[[int], Path] | None = None  # image number → path in the folder; None keeps no images

    def run(
        self, rank: int = 0, ranks: int = 1, *, progress: bool = False, begin: Callable[[Path], None] | None = None
    ) -> dict[str, Any] | None:
        """Draw and score this process's share; returns the record if all shares are complete, else None.

        Args:
            begin: called with the folder before anything is drawn.

        Raises:
            InputError: the metrics cannot score these images, or the folder belongs to another scoring.
        """
        if not self.task.items:
            raise InputError("there is nothing to score: no prompts and no images")
        for metric in self.metrics.values():
            metric.open(self.task)
        plan = self.agree()
        if begin is not None:
            begin(self.folder)
        mine = [number for number in range(rank, self.batch_count, ranks) if not self.part(number).exists()]
        self._draw(mine, progress and rank == 0)
        with locked(self.folder):
            if not all(self.part(number).exists() for number in range(self.batch_count)):
                return None
            rows, shown, run = self._collect()
            self.estimates = {name: metric.estimate(rows) for name, metric in self.metrics.items()}
            record = make_record(plan, self.metrics, self.estimates, run)
            write_json(self.folder / SCORES, record, shared=True)
            self.sheets = write_sheets(self.metrics, shown, rows, self.folder)
            return record

    @property
    def batch_count(self) -> int:
        return -(-len(self.task.items) // self.batch_size)

    def batch(self, number: int) -> range:
        return range(number * self.batch_size, min((number + 1) * self.batch_size, len(self.task.items)))

    def part(self, number: int) -> Path:
        return self.folder / "parts" / f"{number:06d}.npz"

    def agree(self) -> dict[str, Any]:
        """Write the plan of what is scored, or check that the folder has an equal one.

        Raises:
            InputError: the folder has another plan.
        """
        plan = {
            **describe_task(self.task, self.metrics, self.protocol),
            "drawn_with": self.drawer.describe(),
            "batch_size": self.batch_size,
            "versions": {**versions(), "revision": revision()},
        }
        path = self.folder / PLAN
        (self.folder / "parts").mkdir(parents=True, exist_ok=True)
        with locked(self.folder):
            if not path.exists():
                write_json(path, plan, shared=True)
                return plan
            there = json.loads(path.read_text(encoding="utf-8"))
        ours = json.loads(json.dumps(plan))
        if other := [key for key in ours if key != "versions" and there.get(key) != ours[key]]:
            raise InputError(
                f"{self.folder} was begun with other {other[0].replace('_', ' ')}: {str(there.get(other[0]))[:90]} "
                f"there, {str(ours[other[0]])[:90]} now; give another --out"
            )
        return there

    def _draw(self, mine: Sequence[int], progress: bool) -> None:
        makers, wanted = what_to_keep(self.metrics.values())
        started = time.perf_counter()
        total = sum(len(self.batch(number)) for number in mine)
        with tqdm(total=total, desc="drawing and scoring", unit="image", disable=not progress) as bar:
            for number, images in zip(mine, self.drawer.draw(self.batch(n) for n in mine), strict=True):
                numbers = self.batch(number)
                rows = {name: make(images, numbers) for name, make in makers.items()}
                if self.keep is not None:
                    for i, image in zip(numbers, images, strict=True):
                        self._keep(self.folder / self.keep(i), image)
                here = [place for place, i in enumerate(numbers) if i in wanted]
                if here:
                    rows |= {"_shown": images[here], "_numbers": np.array([numbers[place] for place in here])}
                now = time.perf_counter()
                save_rows(self.part(number), {**rows, "_seconds": np.array(now - started), "_memory": memory_gb()})
                started = now
                bar.update(len(images))

    def _keep(self, path: Path, image: np.ndarray) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_png(path, Image.fromarray(image), durable=False, shared=True)

    def _collect(self) -> tuple[dict[str, np.ndarray], dict[int, np.ndarray], dict[str, Any]]:
        """The rows of all images in order, the images to show by number, and speed and memory."""
        parts = []
        for number in range(self.batch_count):
            with np.load(self.part(number), allow_pickle=False) as arrays:
                parts.append({name: arrays[name] for name in arrays.files})
        names = [name for name in parts[0] if not name.startswith("_")]
        rows = {name: np.concatenate([part[name] for part in parts]) for name in names}
        shown = {
            int(number): image
            for part in parts
            if "_shown" in part
            for number, image in zip(part["_numbers"], part["_shown"], strict=True)
        }
        seconds = sum(float(part["_seconds"]) for part in parts)
        return (
            rows,
            shown,
            {
                "images_per_second_of_a_process": len(self.task.items) / max(seconds, 1e-9),
                "memory_gb": max(float(part["_memory"]) for part in parts),
            },
        )


def write_sheets(
    metrics: Mapping[str, ImageMetric],
    images: Mapping[int, np.ndarray],
    rows: Mapping[str, np.ndarray],
    folder: Path,
    suffix: str = "",
) -> list[str]:
    """Write the contact sheets of the metrics, one PNG each, named after the metric; returns a line on each."""
    lines = []
    for name, metric in metrics.items():
        sheet = metric.sheet({number: images[number] for number in metric.shown() if number in images}, rows)
        if sheet is not None:
            path = folder / f"{name.partition(':')[0]}{suffix}.png"
            folder.mkdir(parents=True, exist_ok=True)
            texts = {name: text for name, text in sheet.info.items() if name == "Comment"}  # e.g. an attribution
            write_png(path, sheet, texts, durable=False, shared=True)
            lines.append(f"image: {path} ({metric.legend})" if metric.legend else f"image: {path}")
    return lines


def save_rows(path: Path, rows: Mapping[str, np.ndarray]) -> None:
    buffer = io.BytesIO()
    np.savez(buffer, **rows)
    write_file(path, lambda partial: partial.write_bytes(buffer.getvalue()), durable=False, shared=True)


def memory_gb() -> np.ndarray:
    """Peak memory in GiB: of the GPU's tensors, or of the process on a CPU."""
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return np.array(torch.cuda.max_memory_allocated() / 2**30)
    most = resident("VmHWM")
    if most is None:  # not on Linux
        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 2**10)
    return np.array(most / 2**30)
