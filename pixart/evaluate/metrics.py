"""Metrics by name: a new one is a file of its own and a line here."""

from collections.abc import Iterable, Mapping

from pixart.errors import InputError
from pixart.evaluate.denoising_error import DenoisingError
from pixart.evaluate.loss import Loss
from pixart.evaluate.metric import Metric, Processes
from pixart.registry import Registry

METRICS: Registry[type[Metric]] = Registry("train.metrics")
for _name, _kind in (("loss", Loss), ("denoising_error", DenoisingError)):
    METRICS.register(_name)(_kind)


def make_metrics(names: Iterable[str]) -> dict[str, Metric]:
    """Metrics by names, each perhaps with an argument, `NAME:ARGUMENT`.

    Raises:
        InputError: there is none of a name, its constructor takes no argument or needs one, or two report a number
            under one name.
    """
    metrics: dict[str, Metric] = {}
    owners: dict[str, str] = {}
    for name in names:
        kind, colon, argument = name.partition(":")
        try:
            metrics[name] = METRICS[kind](*[argument] * bool(colon))
        except TypeError as error:
            raise InputError(f"train.metrics: '{name}' cannot be made, as NAME or NAME:ARGUMENT: {error}") from None
        for score in metrics[name].declaration.scores:
            _claim(owners, score.key, name)
    return metrics


def collect(metrics: Mapping[str, Metric], processes: Processes) -> dict[str, float]:
    """The results of all metrics in one; all processes call it.

    Raises:
        InputError: two report a number under one name, or one leaves a score out.
    """
    found: dict[str, float] = {}
    owners: dict[str, str] = {}
    for name, metric in metrics.items():
        result = metric.result(processes)
        if missing := [score.key for score in metric.declaration.scores if score.key not in result]:
            raise InputError(f"metric '{name}' declares '{missing[0]}' and did not report it")
        for key in result:
            _claim(owners, key, name)
        found |= result
    return found


def _claim(owners: dict[str, str], key: str, name: str) -> None:
    if owners.setdefault(key, name) != name:
        raise InputError(
            f"train.metrics: '{owners[key]}' and '{name}' both report '{key}'; take one of them, or rename it (a term "
            "of the objective is reported as validation_TERM)"
        )
