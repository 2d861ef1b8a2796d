"""What changed under a run between its starts: said once, and kept in `history.jsonl`, a line for each start."""

import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from pixart.checkpoint.files import checkpoints
from pixart.config import dump_yaml, load_config
from pixart.data.training_set import Data
from pixart.files import append_rows, read_rows, write_text
from pixart.train.config import TrainConfig
from pixart.train.optimizer import learning_rate

FILE, CONFIG = "history.jsonl", "config.yaml"
Changes = Mapping[str, tuple[Any, Any]]  # dotted key → the value before and now
QUIET = ("output", "resume", "data.workers", "data.cache")  # change nothing that a run is


def read_run_config(run: Path) -> TrainConfig:
    """A run's stored configuration, with the split that it has: `data.split_seed` is never None.

    Raises:
        InputError: it is not there, or cannot be read.
    """
    config = load_config(TrainConfig, run / CONFIG, run_code=False)
    return _with_split(config, config.seed)  # a run begun before the setting was divided by its seed


def settle_split(config: TrainConfig) -> tuple[TrainConfig, list[str]]:
    """The configuration with `data.split_seed` as a number: as given, else the one of the run that goes on, else 0.

    Returns:
        with what is worth telling, as lines.
    """
    run = Path(config.output)
    if config.data.split_seed is not None or not (run / CONFIG).exists() or not checkpoints(run):
        return _with_split(config, 0), []
    seed = read_run_config(run).data.split_seed
    notes = []
    if config.data.validation and load_config(TrainConfig, run / CONFIG, run_code=False).data.split_seed is None:
        notes = [f"this run was begun when held-out images and their noise depended on seed, and keeps them: "
                 f"data.split_seed {seed}"]  # fmt: skip
    return _with_split(config, seed), notes


def _with_split(config: TrainConfig, seed: int) -> TrainConfig:
    return config if config.data.split_seed is not None else replace(config, data=replace(config.data, split_seed=seed))


def note_start(run: Path, step: int, config: TrainConfig, changes: Changes, data: Data, processes: int) -> list[str]:
    """Add a line for this start at `step`, and make its configuration the run's; the main process alone calls it.

    Returns:
        what its user should know of changes, a line each.
    """
    told = {key: pair for key, pair in changes.items() if key not in QUIET}
    notes = [f"changed: {key} {before!r} → {now!r}" for key, (before, now) in told.items()]
    if "train.steps" in changes and config.optimizer.schedule != "constant":
        notes.append(_of_learning_rate(config, step, changes["train.steps"][0]))
    row = {
        "step": step, "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "processes": processes,
        "images": len(data.train), "samples": data.fingerprint,
        "held_out_images": len(data.held_out), "held_out": data.held_out_fingerprint, "changed": told,
    }  # fmt: skip
    earlier = [old for old in read_rows(run / FILE) if old["step"] < step]  # starts that trained
    parts = ("training data", "samples", "images"), ("held-out images", "held_out", "held_out_images")
    for what, key, count in parts:
        before = [old for old in earlier if key in old]
        if before and before[-1][key] != row[key]:
            notes.append(
                f"warning: the {what} are not those of the steps so far ({before[-1][count]} images then, {row[count]} "
                f"now); the run goes on with them, and {FILE} says so"
            )
    try:
        write_text(run / CONFIG, dump_yaml(config))
        append_rows(run / FILE, [row])
    except OSError as error:
        notes.append(f"warning: {CONFIG} or {FILE} in {run} could not be written ({error}); training goes on")
    return notes


def _of_learning_rate(config: TrainConfig, step: int, steps: int) -> str:
    was, now = (
        learning_rate(c.optimizer, step, c.train.steps, c.train.batch_size)
        for c in (replace(config, train=replace(config.train, steps=steps)), config)
    )
    return (
        f"optimizer.schedule {config.optimizer.schedule} ends at train.steps: the next step's learning rate is "
        f"{now:.3g}, with {steps} steps it was {was:.3g}"
    )
