"""Metrics by name; a new one is a file and a line here."""

from collections.abc import Iterable, Mapping
from pathlib import Path

from pixart.errors import InputError
from pixart.evaluate.clip_score import ClipScore
from pixart.evaluate.compositional import Compositional
from pixart.evaluate.denoising_error import DenoisingError
from pixart.evaluate.feature_metrics import FID, KID, PRDC, Frechet
from pixart.evaluate.image_metric import ImageMetric
from pixart.evaluate.loss import Loss
from pixart.evaluate.metric import Metric, Processes
from pixart.evaluate.subject import SubjectScores
from pixart.evaluate.tones import Tones
from pixart.registry import Registry

METRICS: Registry[type[Metric]] = Registry("train.metrics")
for _name, _kind in (
    ("loss", Loss),
    ("denoising_error", DenoisingError),
    ("fid", FID),
    ("frechet", Frechet),
    ("kid", KID),
    ("prdc", PRDC),
    ("clip_score", ClipScore),
    ("compositional", Compositional),
    ("tones", Tones),
    ("subject", SubjectScores),
):
    METRICS.register(_name)(_kind)


def make_metrics(names: Iterable[str], setting: str = METRICS.setting) -> dict[str, Metric]:
    """Make metrics from names, optionally with an argument (`NAME:ARGUMENT`); errors name `setting` as their source.

    Raises:
        InputError: there is no metric of that name, it takes no argument or requires one, or two metrics report a
            number under the same name.
    """
    metrics: dict[str, Metric] = {}
    owners: dict[str, str] = {}
    for name in names:
        kind, colon, argument = name.partition(":")
        try:
            metrics[name] = METRICS.find(kind, setting)(*[argument] * bool(colon))
        except TypeError as error:
            raise InputError(f"{setting}: '{name}' cannot be made, as NAME or NAME:ARGUMENT: {error}") from None
        for score in metrics[name].declaration.scores:
            _claim(owners, score.key, name, setting)
    return metrics


def own_prompts(names: Iterable[str], reference: str | None, setting: str) -> list[str]:
    """What the first of these metrics that has prompts of its own is drawn for; none if none has."""
    kinds = (METRICS.find(name.partition(":")[0], setting) for name in names)
    folder = None if reference is None else Path(reference)
    found = (kind.own_prompts(folder) for kind in kinds if issubclass(kind, ImageMetric))
    return next((prompts for prompts in found if prompts), [])


def collect(metrics: Mapping[str, Metric], processes: Processes) -> dict[str, float]:
    """The results of all metrics in one dict; all processes call it.

    Raises:
        InputError: two metrics report a number under the same name, or one does not report a declared score.
    """
    found: dict[str, float] = {}
    owners: dict[str, str] = {}
    for name, metric in metrics.items():
        result = metric.result(processes)
        if missing := [score.key for score in metric.declaration.scores if score.key not in result]:
            raise InputError(f"metric '{name}' declares '{missing[0]}' and did not report it")
        for key in result:
            _claim(owners, key, name, METRICS.setting)
        found |= result
    return found


def _claim(owners: dict[str, str], key: str, name: str, setting: str) -> None:
    if owners.setdefault(key, name) != name:
        raise InputError(
            f"{setting}: '{owners[key]}' and '{name}' both report '{key}'; take one of them, or rename it (a term "
            "of the objective is reported as validation_TERM)"
        )
