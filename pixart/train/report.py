"""Two small files for who is not looking: is the run alive (`heartbeat.json`), and how did it end (`summary.json`)."""

import hashlib
import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from pixart.config import dump_yaml
from pixart.diffusion.denoising_error import mean_error
from pixart.errors import InputError
from pixart.files import read_rows
from pixart.provenance import versions
from pixart.train.config import TrainConfig
from pixart.train.state import Progress

METRICS, HEARTBEAT, SUMMARY = "metrics.jsonl", "heartbeat.json", "summary.json"
ERROR, BY_RATIO = "validation_error", "validation_error_"


def read_gpu_hours(run: Path) -> float:
    """Device-hours that the heartbeat of this run's last start came to; 0 where there was none.

    The heartbeat knows the steps that a kill has lost, a checkpoint does not.
    """
    path = run / HEARTBEAT
    if not path.exists():
        return 0.0
    try:
        return float(json.loads(path.read_text(encoding="utf-8"))["gpu_hours"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path}: cannot be read ({error}); remove it to count device-hours from 0") from None


def summarise(config: TrainConfig, run: Path, progress: Progress, error: BaseException | None) -> dict:
    """How a run stands or ended, as `summary.json` has it; `error` is what stopped it."""
    finished = error is None and progress.step >= config.train.steps
    why = "finished" if finished else "stopped by a signal"
    if error is not None:
        why = f"{type(error).__name__}: {error}".rstrip(": ")
    rows = read_metrics(run)
    return {
        "finished": finished,
        "why": why,
        "step": progress.step,
        "steps": config.train.steps,
        "images": progress.images,
        "seconds": progress.seconds,
        "loss": last_value(rows, "loss"),
        **last_and_best(rows, "validation_loss"),
        **last_and_best(rows, ERROR),
        "skipped": progress.skipped,
        "unreadable": len(progress.unreadable),
        "config_sha256": hashlib.sha256(dump_yaml(config).encode()).hexdigest(),
        "versions": versions(),
    }


def read_metrics(run: Path) -> list[dict]:
    """The rows of a run's metrics.jsonl, none if it has none.

    `validation_error` is made anew from the errors at its ratios: earlier versions logged their plain mean, which must
    not be compared with the geometric one.
    """
    rows = list(read_rows(run / METRICS))
    for row in rows:
        if by_ratio := [value for name, value in row.items() if name.startswith(BY_RATIO)]:
            row[ERROR] = mean_error(by_ratio) if all(map(is_number, by_ratio)) else None
    return rows


def find_ratios(names: Iterable[str]) -> list[str]:
    """The ratios of noise to signal at which there are errors among metrics' names, as they are written there."""
    return sorted({name.removeprefix(BY_RATIO) for name in names if name.startswith(BY_RATIO)}, key=float)


def is_number(value: Any) -> bool:
    """Whether a metric has a finite value: null stands for one that had none, NaN did in older files."""
    return value is not None and math.isfinite(value)


def last_value(rows: Sequence[dict], name: str) -> Any:
    """The last row's that has it, None if it was not finite there; None where none has."""
    return next((row[name] for row in reversed(rows) if name in row), None)


def last_and_best(rows: Sequence[dict], name: str) -> dict[str, float | int | None]:
    """A metric's last value, its lowest, and that one's step; None where it was not logged or is not finite."""
    found = [(row[name], row["step"]) for row in rows if is_number(row.get(name))]
    best, step = min(found, default=(None, None))
    return {name: last_value(rows, name), f"best_{name}": best, f"best_{name}_step": step}
