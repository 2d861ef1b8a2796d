"""The contract of a metric: what it declares, what it is shown, and what it reports."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor, nn

from pixart.diffusion.objective import Example, Objective
from pixart.errors import InputError

# what a metric may need: the held-out data of a run, images that were generated for prompts, the network alone
NEEDS = ("held_out", "images", "network")


@dataclass(frozen=True)
class Score:
    """One number of a metric, as logs, summaries, tables and plots know it."""

    key: str  # its name in metrics.jsonl
    label: str  # what it is: the title of its panel in plots
    better: Literal["lower", "higher"] | None = None  # None: neither, so that no value of it is the best
    unit: str = ""
    # of one of several numbers that the score before them is made of: its name among them. Parts of one label share a
    # panel, and have a column but no best value; scores without it are headlines
    part: str = ""
    log: bool = False  # drawn on a logarithmic axis

    def __post_init__(self):
        if self.better not in ("lower", "higher", None):
            raise InputError(f"score {self.key}: better: got {self.better!r}, expected lower, higher or None")


@dataclass(frozen=True)
class Declaration:
    """All that is known of a metric where its numbers are shown; a run keeps it in `metrics.json`."""

    scores: tuple[Score, ...]  # the first is what the metric is judged by; numbers beyond these are logged, not shown
    needs: tuple[str, ...] = ("held_out",)  # of NEEDS
    of_objective: bool = False  # it measures what a run minimises, and so another thing with another objective

    def __post_init__(self):
        if other := [need for need in self.needs if need not in NEEDS]:
            raise InputError(f"needs: got '{other[0]}', expected some of {', '.join(NEEDS)}")


@dataclass(frozen=True)
class Subject:
    """What is measured."""

    network: nn.Module  # the averaged weights
    objective: Objective  # with its trained modules' averages; holds schedule and `DiffusionConfig`
    device: torch.device


@dataclass(frozen=True)
class HeldOut:
    """A batch of B held-out images."""

    example: Example  # no caption is dropped; times and noise are the same at every validation
    weight: Tensor  # (B,) 1, or 0 for an image that does not count, whose numbers may be anything
    network: Callable[[Tensor, Tensor], Tensor]  # network(x_t, t), with captions and conditions


class Processes(Protocol):
    """All processes of a job, as accelerate's `Accelerator` has them."""

    def reduce(self, tensor: Tensor) -> Tensor:
        """The sum over all processes, of tensors of one shape."""

    def gather(self, tensor: Tensor) -> Tensor:
        """The rows of all processes, one after another, of tensors of one shape."""


class Metric:
    """A measure under a name of `pixart.evaluate.metrics.METRICS`, `METRICS.register("mine")(Mine)`.

    An object lives as long as a run and measures again and again: `begin`, `add` for every batch, `result`. What is
    costly to make is made in `begin` when it is first needed. A text after a colon, as in `mine:0.5`, is given to the
    constructor, which sets `declaration` if that depends on it.
    """

    declaration: Declaration

    def begin(self, subject: Subject) -> None:
        """Forget what was added, and measure `subject` from now on."""
        self.subject = subject

    def add(self, held: HeldOut) -> None:
        """Take in a batch, if "held_out" is needed; without gradients and under the run's autocast.

        All processes call it equally often, since a sharded network needs all of them: one that has no batch left gets
        one of weight 0. Sums stay on the device, which nothing here may wait for.
        """
        raise NotImplementedError(f"{type(self).__name__} has no add")

    def result(self, processes: Processes) -> dict[str, float]:
        """Numbers by their names in metrics.jsonl, over all processes, which all call it: every score's, NaN where
        there is nothing to measure, and others that are worth logging."""
        raise NotImplementedError(f"{type(self).__name__} has no result")

    @classmethod
    def reread(cls, row: dict) -> dict:
        """What of a logged row must be replaced because an earlier version meant something else by it."""
        return {}


class PerImage(Metric):
    """A metric that is a mean over images: `measure` is all that it needs."""

    @property
    def rows(self) -> int:
        return len(self.declaration.scores)

    def measure(self, held: HeldOut) -> Tensor:
        """Numbers (rows, B), a row for each score, or (B,) for a single one."""
        raise NotImplementedError(f"{type(self).__name__} has no measure")

    def begin(self, subject: Subject) -> None:
        super().begin(subject)
        self._sums = torch.zeros(self.rows, device=subject.device)
        self._count = torch.zeros((), device=subject.device)

    def add(self, held: HeldOut) -> None:
        # where, not a product: what does not count may be NaN
        self._sums += torch.where(held.weight > 0, self.measure(held).float(), 0.0).sum(-1)
        self._count += held.weight.sum()

    def means(self, processes: Processes) -> list[float]:
        """Over all images of all processes, NaN without any."""
        sums, count = processes.reduce(self._sums), processes.reduce(self._count).item()
        return (sums / (count or math.nan)).tolist()

    def result(self, processes: Processes) -> dict[str, float]:
        keys = (score.key for score in self.declaration.scores)
        return dict(zip(keys, self.means(processes), strict=True))
