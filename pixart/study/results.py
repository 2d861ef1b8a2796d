"""What a study's runs have measured: values by arm and seed, their means, and the differences to the baseline."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median

import torch

from pixart.evaluate.interval import Estimate
from pixart.evaluate.metric import Score
from pixart.files import read_json, read_rows
from pixart.model.flops import forward_flops
from pixart.model.pixart import PixArt
from pixart.study.plan import Arm, Run, Study, step_flops
from pixart.study.runner import FINISHED, is_finished, why_failed
from pixart.study.statistics import Difference, holm, mean_over_seeds, paired_difference
from pixart.train.config import TrainConfig
from pixart.train.history import FILE
from pixart.train.metrics import best_value, headlines, is_number, last_value, merge_declarations, read_metrics

COSTS = ("gpu_hours", "images_per_second", "memory_gb")


@dataclass(frozen=True)
class RunValues:
    """The numbers of one run; only those of finished runs count."""

    run: Run
    failed: str | None
    rows: list[dict]
    final: dict[str, float]  # finite values of scores, by key
    best: dict[str, float]
    costs: dict[str, float]
    prints: dict[str, str] = field(default_factory=dict)  # fingerprints of code and data

    @property
    def finished(self) -> bool:
        return is_finished(self.run)

    @property
    def status(self) -> str:
        return "finished" if self.finished else f"failed: {self.failed}" if self.failed else "not finished"


@dataclass(frozen=True)
class Comparison:
    """The difference of an arm to the baseline in one score."""

    arm: str
    score: Score
    difference: Difference
    corrected: float | None  # p corrected for the number of comparisons (Holm)
    margin: float | None

    @property
    def worse(self) -> bool:
        """Whether the arm is worse, its interval clear of zero."""
        return self.difference.clear and (self.difference.mean < 0) == (self.score.better == "higher")

    @property
    def verdict(self) -> str:
        found = self.difference
        if found.low is None or found.high is None:
            return "one seed, so no interval"
        if found.low == found.high == 0:
            return "identical in every seed"
        text = "no difference shown" if not found.clear else "worse" if self.worse else "better"
        if found.clear and self.corrected is not None and self.corrected > 0.05:
            text += ", but not after Holm's correction"
        if self.margin is not None and (self.worse or not found.clear):
            worst, least = (-found.low, -found.high) if self.score.better == "higher" else (found.high, found.low)
            how = "at most" if worst < self.margin else "more than" if least > self.margin else "perhaps more than"
            text += f"; {how} {self.margin:g} worse"
        return text


@dataclass(frozen=True)
class Results:
    study: Study
    values: dict[str, dict[int, RunValues]]  # by arm and seed
    scores: dict[str, Score]  # all that the runs report: headlines first, then their parts
    comparisons: list[Comparison]

    def finished(self, arm: str) -> list[RunValues]:
        return [values for values in self.values[arm].values() if values.finished]

    def mean(self, arm: str, key: str, what: str = "final") -> Estimate | None:
        """The mean of an arm's finished runs; None if none has the value."""
        found = [of[key] for values in self.finished(arm) if key in (of := getattr(values, what))]
        return mean_over_seeds(found, self.study.config.confidence) if found else None

    @property
    def planted_was_found(self) -> bool | None:
        """Whether the arm known to be worse is worse in any tested score; None if there is no such arm or result."""
        found = [one.worse for one in self.comparisons if one.arm == self.study.config.planted]
        return any(found) if found else None


def read_results(study: Study) -> Results:
    """The results of a study as far as its runs are finished."""
    values = {name: {run.seed: _read(run) for run in arm.runs} for name, arm in study.arms.items()}
    begun = [run.folder for run in study.runs if run.folder.is_dir()]
    declared = merge_declarations(begun)
    main = {score.key: score for score in headlines(declared.values())}
    parts = {score.key: score for of in declared.values() for score in of.scores}
    scores = {**study.tested, **main, **parts}
    scores = {
        key: score
        for key, score in scores.items()
        if any(key in v.final for of in values.values() for v in of.values())
    }
    return Results(study, values, scores, compare_arms(study, values))


def compare_arms(study: Study, values: Mapping[str, Mapping[int, RunValues]]) -> list[Comparison]:
    """Every arm's difference to the baseline in every tested score, over the seeds that both have finished."""

    def of(arm: str, key: str) -> dict[int, float]:
        return {seed: v.final[key] for seed, v in values[arm].items() if v.finished and key in v.final}

    base, config = study.baseline.name, study.config
    found = [
        (arm, score, difference)
        for key, score in study.tested.items()
        for arm in study.arms
        if arm != base and (difference := paired_difference(of(arm, key), of(base, key), config.confidence))
    ]
    tested = [i for i, (_, _, difference) in enumerate(found) if difference.p is not None]
    corrected = dict(zip(tested, holm([found[i][2].p or 0.0 for i in tested]), strict=True))
    return [
        Comparison(arm, score, difference, corrected.get(i), config.margin.get(score.key))
        for i, (arm, score, difference) in enumerate(found)
    ]


def size_of(config: TrainConfig) -> dict[str, float]:
    """Parameters of the network, FLOPs of a forward of one image, and FLOPs of a training step."""
    model = config.model
    with torch.device("meta"):
        parameters = sum(parameter.numel() for parameter in PixArt(model).parameters())
    forward = forward_flops(model, model.latent_size, model.latent_size, config.text.length)
    return {"parameters": parameters, "forward_flops": forward, "step_flops": step_flops(config)}


def confounded(arm: Arm) -> Sequence[str]:
    """The settings that this arm changes together, so that none alone explains its result; empty for at most one."""
    return [*arm.written] if len(arm.written) > 1 else []


def _read(run: Run) -> RunValues:
    rows = read_metrics(run.folder)
    declared = merge_declarations([run.folder])
    final, best = {}, {}
    for declaration, score in ((of, score) for of in declared.values() for score in of.scores):
        if is_number(value := last_value(rows, score.key)):
            final[score.key] = float(value)
        if not declaration.of_objective and (value := best_value(rows, score)[0]) is not None:
            best[score.key] = float(value)
    numbers = {key: [row[key] for row in rows if is_number(row.get(key))] for key in COSTS}
    kinds = {"gpu_hours": max, "images_per_second": median, "memory_gb": max}
    costs = {key: float(kinds[key](found)) for key, found in numbers.items() if found}
    costs |= {key: last_value(rows, key) for key in ("step", "images") if is_number(last_value(rows, key))}
    return RunValues(run, why_failed(run), rows, final, best, costs, _prints(run))


def _prints(run: Run) -> dict[str, str]:
    starts = list(read_rows(run.folder / FILE))
    found = {key: str(starts[-1][key]) for key in ("samples", "held_out") if starts and starts[-1].get(key)}
    if is_finished(run):
        found["code"] = str(read_json(run.folder / FINISHED).get("revision", "unknown"))
    return found
