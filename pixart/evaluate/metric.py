"""The contract of a metric: what it declares, what it receives, and what it reports."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor, nn

from pixart.diffusion.objective import Example, Objective
from pixart.errors import InputError

# what a metric may need: the held-out data of a run, images drawn for prompts, or only the network
NEEDS = ("held_out", "images", "network")


@dataclass(frozen=True)
class Score:
    """One number of a metric, as used by logs, summaries, tables and plots."""

    key: str  # its name in metrics.jsonl
    label: str  # a description: the title of its panel in plots
    better: Literal["lower", "higher"] | None = None  # None: neither, so there is no best value
    unit: str = ""
    # a score with a `part` is a component of the last score without one (a headline), and `part` is its name among the
    # components. Components with the same label share a panel; they have a column in tables but no best value
    part: str = ""
    log: bool = False  # drawn on a logarithmic axis

    def __post_init__(self):
        if self.better not in ("lower", "higher", None):
            raise InputError(f"score {self.key}: better: got {self.better!r}, expected lower, higher or None")


@dataclass(frozen=True)
class Declaration:
    """The description of a metric for logs, tables and plots; a run stores it in `metrics.json`."""

    scores: tuple[Score, ...]  # the first is the main one; further numbers that a metric reports are logged, not shown
    needs: tuple[str, ...] = ("held_out",)  # a subset of NEEDS
    of_objective: bool = False  # it depends on the training objective, so it cannot be compared between objectives

    def __post_init__(self):
        if other := [need for need in self.needs if need not in NEEDS]:
            raise InputError(f"needs: got '{other[0]}', expected some of {', '.join(NEEDS)}")


@dataclass(frozen=True)
class Subject:
    """What is measured."""

    network: nn.Module  # with the averaged weights
    objective: Objective  # with averaged weights of its trained modules; has the schedule and `DiffusionConfig`
    device: torch.device


@dataclass(frozen=True)
class HeldOut:
    """A batch of B held-out images."""

    example: Example  # without caption dropout; times and noise are the same in every validation
    weight: Tensor  # (B,) 1, or 0 for an image that does not count, whose values are arbitrary
    network: Callable[[Tensor, Tensor], Tensor]  # network(x_t, t); captions and conditions are already bound


class Processes(Protocol):
    """Collective operations of a job, as in accelerate's `Accelerator`."""

    def reduce(self, tensor: Tensor) -> Tensor:
        """The sum over all processes of tensors with equal shapes."""

    def gather(self, tensor: Tensor) -> Tensor:
        """The concatenated rows of all processes, of tensors with equal shapes."""


class Metric:
    """Base class of metrics, registered as `METRICS.register("mine")(Mine)` (`pixart.evaluate.metrics`).

    An object lives as long as a run and is used for every validation: `begin`, then `add` for every batch, then
    `result`. Expensive resources should be created in the first `begin`. The text after a colon in a metric's name, as
    in `mine:0.5`, is passed to the constructor, which then also sets `declaration` if it depends on it.
    """

    declaration: Declaration

    def begin(self, subject: Subject) -> None:
        """Reset, and measure `subject` from now on."""
        self.subject = subject

    def add(self, held: HeldOut) -> None:
        """Add a batch (for metrics that need "held_out"); called without gradients, under the run's autocast.

        All processes call it equally often, because a sharded network needs all of them; a process without a batch left
        gets one of weight 0. Sums must stay on the device: nothing here may synchronise it.
        """
        raise NotImplementedError(f"{type(self).__name__} has no add")

    def result(self, processes: Processes) -> dict[str, float]:
        """Numbers over all processes, by their names in metrics.jsonl: every declared score, NaN if there was nothing
        to measure, and any others to be logged. All processes call it."""
        raise NotImplementedError(f"{type(self).__name__} has no result")

    @classmethod
    def reread(cls, row: dict) -> dict:
        """Replacements for values of a logged row whose meaning was different in an earlier version."""
        return {}


class PerImage(Metric):
    """A metric that is a mean over images; a subclass only defines `measure`."""

    @property
    def rows(self) -> int:
        return len(self.declaration.scores)

    def measure(self, held: HeldOut) -> Tensor:
        """Values (rows, B), one row per score; or (B,) for a single score."""
        raise NotImplementedError(f"{type(self).__name__} has no measure")

    def begin(self, subject: Subject) -> None:
        super().begin(subject)
        self._sums = torch.zeros(self.rows, device=subject.device)
        self._count = torch.zeros((), device=subject.device)

    def add(self, held: HeldOut) -> None:
        # torch.where, not a product: values that do not count may be NaN
        self._sums += torch.where(held.weight > 0, self.measure(held).float(), 0.0).sum(-1)
        self._count += held.weight.sum()

    def means(self, processes: Processes) -> list[float]:
        """Means over all images of all processes; NaN if there are none."""
        sums, count = processes.reduce(self._sums), processes.reduce(self._count).item()
        return (sums / (count or math.nan)).tolist()

    def result(self, processes: Processes) -> dict[str, float]:
        keys = (score.key for score in self.declaration.scores)
        return dict(zip(keys, self.means(processes), strict=True))
