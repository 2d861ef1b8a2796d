"""The denoising error on held-out images, which can be compared between runs with any objective."""

import math

from torch import Tensor

from pixart.diffusion.denoising_error import RATIOS, denoising_errors, mean_error
from pixart.evaluate.metric import Declaration, HeldOut, PerImage, Processes, Score

KEY = "validation_error"
BY_RATIO = {ratio: f"{KEY}_{ratio:g}" for ratio in RATIOS}


class DenoisingError(PerImage):
    """`denoising_errors` at every noise-to-signal ratio, and their geometric mean."""

    declaration = Declaration(
        (
            Score(KEY, "error of clean images, comparable between runs: geometric mean over the ratios", "lower"),
            *(
                Score(key, "the same at every ratio of noise to signal", "lower", part=f"at {ratio:g}", log=True)
                for ratio, key in BY_RATIO.items()
            ),
        )
    )
    rows = len(RATIOS)

    def measure(self, held: HeldOut) -> Tensor:
        objective, example = self.subject.objective, held.example
        return denoising_errors(held.network, objective.schedule, objective.config, example.x0, example.noise)

    def result(self, processes: Processes) -> dict[str, float]:
        errors = self.means(processes)
        return {KEY: mean_error(errors), **dict(zip(BY_RATIO.values(), errors, strict=True))}

    @classmethod
    def reread(cls, row: dict) -> dict:
        """Earlier versions logged the arithmetic mean, which must not be compared with the geometric mean."""
        errors = [row[key] for key in BY_RATIO.values() if key in row]
        if not errors:
            return {}
        finite = all(error is not None and math.isfinite(error) for error in errors)
        return {KEY: mean_error(errors) if finite else None}
