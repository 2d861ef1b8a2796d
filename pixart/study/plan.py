"""A study's arms and runs, settled and checked before any training."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pixart.arguments import say
from pixart.config import build_settings, flatten, meaning, resolve_paths, to_dict
from pixart.errors import InputError, did_you_mean
from pixart.evaluate.metric import Declaration, Score
from pixart.evaluate.metrics import make_metrics
from pixart.model.flops import training_flops
from pixart.settings import Settings, read_settings
from pixart.shipped import find_config
from pixart.study.config import BudgetConfig, StudyConfig, apply, folder_name, read_study
from pixart.train.config import TrainConfig
from pixart.train.estimate import drawn_shapes, latent_size
from pixart.train.metrics import open_metrics


@dataclass(frozen=True)
class Run:
    """One training run of a study."""

    arm: str
    seed: int
    config: TrainConfig

    @property
    def folder(self) -> Path:
        return Path(self.config.output)

    @property
    def name(self) -> str:
        return f"{self.arm}, seed {self.seed}"


@dataclass(frozen=True)
class Arm:
    """What is compared: the runs of one set of settings, which differ in their seed alone."""

    name: str
    runs: tuple[Run, ...]
    written: dict[str, Any]  # the settings that the study's file gives for this arm, by dotted key
    differing: dict[str, tuple[Any, Any]]  # all settings that differ from the baseline's: (there, here)

    @property
    def config(self) -> TrainConfig:
        """The configuration of its first run."""
        return self.runs[0].config


@dataclass(frozen=True)
class Study:
    file: Path
    folder: Path
    config: StudyConfig
    arms: dict[str, Arm]
    tested: dict[str, Score]  # the scores whose differences are tested, by key
    untested: dict[str, str]  # further scores of the runs, and why they are not tested

    @property
    def baseline(self) -> Arm:
        return self.arms[self.config.baseline or next(iter(self.arms))]

    @property
    def runs(self) -> list[Run]:
        """All runs, seed by seed, so that a study that was cut short has whole pairs."""
        return [run for of_seed in zip(*(arm.runs for arm in self.arms.values()), strict=True) for run in of_seed]


def plan_study(file: str | Path, overrides: Sequence[str] = ()) -> Study:
    """Read a study's file, a training configuration with a section `study`, and check all its arms.

    Args:
        overrides: `key=value`, as for `load_config`; those of the study itself are `study.key=value`.

    Raises:
        InputError: the file, an arm's configuration or the `study` section is wrong; two arms are equal; there is
            nothing to compare; a score that is to be tested cannot be compared. Nothing was written.
    """
    file = find_config(file)
    shared = read_settings(file, overrides)
    study, changes = read_study(shared, file)
    if (output := shared.get("output")) is None or not isinstance(output, str):
        raise InputError(f"{file}: output: got {say(output)}, expected a folder for the study's runs and its report")
    configs = {arm: _settle(shared, settings, study, arm, file) for arm, settings in changes.items()}
    baseline = study.baseline or next(iter(configs))
    if not study.null:
        _check_distinct(configs)
    budgets = {arm: config.train.steps for arm, config in configs.items()}
    if study.budget == BudgetConfig() and len(set(budgets.values())) > 1:
        raise InputError(
            f"study: the arms take different train.steps ({', '.join(f'{k}: {v}' for k, v in budgets.items())}); set "
            "study.budget to the steps, images or flops that each may spend"
        )
    differing = {arm: differences(configs[baseline], config) for arm, config in configs.items()}
    tested, untested = _choose_scores(study, configs, differing, baseline)
    folder = Path(output)
    arms = {
        arm: Arm(arm, _runs(arm, config, study.seeds, folder), dict(changes[arm]), differing[arm])
        for arm, config in configs.items()
    }
    return Study(file, folder, study, arms, tested, untested)


def differences(baseline: TrainConfig, config: TrainConfig) -> dict[str, tuple[Any, Any]]:
    """The settings in which two configurations differ and that make them another experiment, by dotted key."""
    there, here = flatten(to_dict(baseline)), flatten(to_dict(config))
    keys = [key for key in {**there, **here} if meaning(TrainConfig, key, "compare") != "quiet"]
    return {key: (there.get(key), here.get(key)) for key in keys if there.get(key) != here.get(key)}


def step_flops(config: TrainConfig) -> int:
    """FLOPs of the network in a training step: forward and backward, without recomputed activations."""
    shape = config.model, *latent_size(config), config.text.length
    return training_flops(*shape, config.train.batch_size, drawn_shapes(config))


def why_incomparable(declaration: Declaration, keys: Sequence[str]) -> str | None:
    """Why a metric's values mean different things in two runs whose settings `keys` differ; None if they do not."""
    of = {what: [key for key in keys if meaning(TrainConfig, key, "compare") == what] for what in ("loss", "images")}
    if declaration.of_objective and of["loss"]:
        return f"it measures the training objective, and {', '.join(of['loss'])} differ"
    if "held_out" in declaration.needs and of["images"]:
        return f"it is measured on other data ({', '.join(of['images'])} differ)"
    return None


def _settle(shared: Settings, changes: Settings, study: StudyConfig, arm: str, file: Path) -> TrainConfig:
    settings, budget = apply(shared, changes), study.budget
    train = settings.get("train")
    if isinstance(train, Settings) and "steps" not in train and budget != BudgetConfig():
        train["steps"], train.places["steps"] = 1, str(file)
    try:
        config = build_settings(TrainConfig, settings, file)
    except InputError as error:
        raise InputError(f"arm '{arm}': {error}") from None
    return replace(config, train=replace(config.train, steps=_steps(config, budget, study.spent.get(arm, 0), arm)))


def _steps(config: TrainConfig, budget: BudgetConfig, spent: float, arm: str) -> int:
    """The steps that an arm may do with what it has not spent yet."""
    if budget == BudgetConfig():
        return config.train.steps
    (unit, whole), *_ = ((key, value) for key, value in vars(budget).items() if value is not None)
    step = {"steps": 1, "images": config.train.batch_size, "flops": step_flops(config) if unit == "flops" else 0}[unit]
    steps = (whole - spent) / step
    steps = math.floor(steps) if unit == "flops" else math.ceil(steps)
    if steps < 1:
        already = f" without the {spent:g} that it has spent" if spent else ""
        raise InputError(f"study.budget.{unit}: got {whole:g}{already}, less than one step of arm '{arm}' ({step:.3g})")
    return steps


def _runs(arm: str, config: TrainConfig, seeds: Sequence[int], folder: Path) -> tuple[Run, ...]:
    places = {seed: folder / folder_name(arm) / f"seed_{seed}" for seed in seeds}
    return tuple(Run(arm, seed, replace(config, seed=seed, output=str(place))) for seed, place in places.items())


def settle_paths(run: Run) -> Run:
    """The run with absolute paths, once the data that they name exists."""
    return replace(run, config=resolve_paths(config=run.config))


def _check_distinct(configs: Mapping[str, TrainConfig]) -> None:
    seen: dict[str, str] = {}
    for arm, config in configs.items():
        text = json.dumps(to_dict(config), sort_keys=True, default=str)
        if (other := seen.setdefault(text, arm)) != arm:
            raise InputError(
                f"study: the arms '{other}' and '{arm}' have equal settings; remove one, or set study.null to true if "
                "their difference is to show that there is none"
            )


def _choose_scores(
    study: StudyConfig, configs: Mapping[str, TrainConfig], differing: Mapping[str, dict], baseline: str
) -> tuple[dict[str, Score], dict[str, str]]:
    """The scores to be tested, and why the others are not."""
    scores: dict[str, Score] = {}
    reasons: dict[str, str] = {}
    headlines = []
    declared = {arm: _declared(config) for arm, config in configs.items()}
    for declaration in declared[baseline].values():
        headlines += [score.key for score in declaration.scores[:1]]
        for score in declaration.scores:
            scores[score.key] = score
            for arm in configs:
                keys = {other.key for of in declared[arm].values() for other in of.scores}
                why = why_incomparable(declaration, [*differing[arm]])
                if score.key not in keys:
                    why = "it does not compute it"
                if why is not None:
                    reasons.setdefault(score.key, f"in arm '{arm}', {why}")
            if score.better is None:
                reasons.setdefault(score.key, "neither direction is better")
    if not scores:
        raise InputError(
            "study: the runs compute no metric, so nothing can be compared; set train.evaluate_every with "
            "evaluate.metrics, or train.validate_every with held-out images"
        )
    for key in (*study.metrics, *study.margin):
        if key not in scores:
            what = "metrics" if key in study.metrics else "margin"
            raise InputError(
                f"study.{what}: the runs compute no '{key}'{did_you_mean(key, scores)} (there are {', '.join(scores)})"
            )
        if key in reasons:
            raise InputError(f"study: {key} cannot be compared: {reasons[key]}; leave it out of metrics and margin")
    names = study.metrics or [key for key in headlines if key not in reasons]
    if not names:
        raise InputError(f"study: nothing can be compared: {'; '.join(f'{k}: {v}' for k, v in reasons.items())}")
    if other := [key for key in study.margin if key not in names]:
        raise InputError(f"study.margin: {other[0]} is not tested; name it in study.metrics")
    return {key: scores[key] for key in names}, {key: why for key, why in reasons.items() if key in headlines}


def _declared(config: TrainConfig) -> dict[str, Declaration]:
    """The metrics that a run of this configuration will compute."""
    found = open_metrics(config) if config.train.validate_every else {}
    if config.train.evaluate_every:
        found = found | make_metrics(config.evaluate.metrics, "evaluate.metrics")
    return {name: metric.declaration for name, metric in found.items()}
