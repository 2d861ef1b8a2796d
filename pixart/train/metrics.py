"""The numbers that a run stores: rows in metrics.jsonl, and the declarations of their metrics in metrics.json."""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from pixart.config import build_written, differences
from pixart.errors import InputError
from pixart.evaluate.metric import Declaration, Metric, Score
from pixart.evaluate.metrics import METRICS, make_metrics
from pixart.files import read_rows, write_json
from pixart.train.config import TrainConfig

METRICS_FILE, DECLARED = "metrics.jsonl", "metrics.json"
SUPPLIED = ("held_out", "network")  # what training can give a metric
# names in the rows that training logs, besides the objective's terms
TRAINING = {
    "step",
    "loss",
    "loss_q1",
    "loss_q2",
    "loss_q3",
    "loss_q4",
    "grad_norm",
    "lr",
    "images_per_second",
    "data_wait",
    "model_tflops",
    "mfu",
    "memory_gb",
    "skipped",
    "images",
    "seconds",
    "gpu_hours",
    "save_stall",
}


def open_metrics(config: TrainConfig) -> dict[str, Metric]:
    """The metrics of `train.metrics` by name.

    Raises:
        InputError: as in `make_metrics`; or a metric needs something that training does not have, or reports a number
            under a name that training uses.
    """
    metrics = make_metrics(config.train.metrics)
    for name, metric in metrics.items():
        if lacking := [need for need in metric.declaration.needs if need not in SUPPLIED]:
            raise InputError(
                f"train.metrics: '{name}' needs {', '.join(lacking)}, but a validation during training only has "
                f"{', '.join(SUPPLIED)}; leave it out"
            )
        if taken := [score.key for score in metric.declaration.scores if score.key in TRAINING]:
            raise InputError(f"train.metrics: '{name}' reports '{taken[0]}', a name that training uses; rename it")
    return metrics


def declared_metrics(config: TrainConfig) -> dict[str, Metric]:
    """All metrics whose numbers a run may log: those of validations and those of drawn images."""
    return open_metrics(config) | make_metrics(config.evaluate.metrics, "evaluate.metrics")


# ------------------------------------------------------------------------------------------------------- declarations


def read_declarations(run: Path) -> dict[str, Declaration]:
    """The declarations of a run's metrics over all its starts, by name; empty for runs of earlier versions.

    Raises:
        InputError: metrics.json is damaged.
    """
    path = run / DECLARED
    if not path.exists():
        return {}
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        items = record.items()
    except (OSError, ValueError, AttributeError) as error:
        raise InputError(f"{path}: cannot be read ({error}); remove it to go on without it") from None
    return {name: build_written(Declaration, value, f"{path}: {name}: ") for name, value in items}


def write_declarations(run: Path, metrics: Mapping[str, Metric]) -> None:
    """Store the declarations of metrics, besides those of earlier starts."""
    known = read_declarations(run)
    held = known | {name: metric.declaration for name, metric in metrics.items()}
    if held != known:
        record = {
            name: {
                **{key: value for key, value in differences(declaration).items() if key != "scores"},
                "scores": [differences(score) for score in declaration.scores],
            }
            for name, declaration in held.items()
        }
        write_json(run / DECLARED, record, durable=False)


def merge_declarations(runs: Iterable[str | Path]) -> dict[str, Declaration]:
    """The declarations of the numbers that runs logged: those that the runs stored, else those of this version's
    metrics.

    Returns:
        declarations by metric name, only with the scores that occur in some run.
    """
    merged: dict[str, Declaration] = {}
    taken: set[str] = set()
    ours = {name: kind.declaration for name in METRICS if hasattr(kind := METRICS[name], "declaration")}
    for run in map(Path, runs):
        logged = {key for row in read_rows(run / METRICS_FILE) for key in row}
        own = read_declarations(run)
        for name, declaration in [*own.items(), *(item for item in ours.items() if item[0] not in own)]:
            new = tuple(score for score in declaration.scores if score.key in logged - taken)
            if new:
                before = merged[name].scores if name in merged else ()
                merged[name] = replace(declaration, scores=(*before, *new))
                taken |= {score.key for score in new}
    return merged


def headlines(declarations: Iterable[Declaration]) -> list[Score]:
    return [score for declaration in declarations for score in declaration.scores if not score.part]


# --------------------------------------------------------------------------------------------------------------- rows


def read_metrics(run: Path) -> list[dict]:
    """The rows of a run's metrics.jsonl, empty if there is none. A number that an earlier version defined differently
    is recomputed, see `Metric.reread`."""
    rows = list(read_rows(run / METRICS_FILE))
    for row in rows:
        for name in METRICS:
            row.update(METRICS[name].reread(row))
    return rows


def is_number(value: Any) -> bool:
    """Whether a metric's value is finite: if it was not, files hold null, and older files NaN."""
    return value is not None and math.isfinite(value)


def last_value(rows: Sequence[dict], name: str) -> Any:
    """The value in the last row that has it (None if it was not finite there), or None if no row has it."""
    return next((row[name] for row in reversed(rows) if name in row), None)


def best_value(rows: Sequence[dict], score: Score) -> tuple[float | None, int | None]:
    """A score's best value and the first step that reached it; None if it was never logged or never finite, or has no
    better direction."""
    sign = {"lower": 1, "higher": -1, None: 0}[score.better]
    found = [(sign * row[score.key], row["step"], row[score.key]) for row in rows if is_number(row.get(score.key))]
    _, step, best = min(found, default=(None, None, None)) if sign else (None, None, None)
    return best, step


def last_and_best(rows: Sequence[dict], score: Score) -> dict[str, float | int | None]:
    """A score's last value and, if it has a better direction, its best value and that value's step."""
    last = {score.key: last_value(rows, score.key)}
    if score.better is None:
        return last
    best, step = best_value(rows, score)
    return last | {f"best_{score.key}": best, f"best_{score.key}_step": step}
