"""The loss on held-out images, with all terms of the objective."""

import math

import torch
from torch import Tensor

from pixart.diffusion.timestep_bins import bin_means, sum_by_bin
from pixart.errors import InputError
from pixart.evaluate.metric import Declaration, HeldOut, Metric, Processes, Score, Subject


class Loss(Metric):
    """The loss: overall, in timestep bins, and the objective's other terms."""

    declaration = Declaration((Score("validation_loss", "validation loss", "lower"),), of_objective=True)

    def begin(self, subject: Subject) -> None:
        super().begin(subject)
        self.sums = torch.zeros(2, 4, device=subject.device)
        self.terms: dict[str, Tensor] = {}

    def add(self, held: HeldOut) -> None:
        losses = self.subject.objective(self.subject.network, held.example)
        self.sums += sum_by_bin(losses["loss"], held.example.time, held.weight)
        for name, values in losses.items():
            if name != "loss":
                total = torch.where(held.weight > 0, values.float(), 0.0).sum()
                self.terms[name] = self.terms.get(name, 0) + total

    def result(self, processes: Processes) -> dict[str, float]:
        sums = processes.reduce(self.sums)
        total, count = sums.sum(1).tolist()
        count = count or math.nan  # NaN if no image was held out, or none could be read
        row = {"validation_loss": total / count, **bin_means(sums, "validation_loss")}
        if taken := [name for name in self.terms if f"validation_{name}" in row]:
            raise InputError(f"objective: its term '{taken[0]}' has the name of another metric; rename it")
        terms = {name: processes.reduce(value).item() / count for name, value in self.terms.items()}
        return row | {f"validation_{name}": value for name, value in terms.items()}
