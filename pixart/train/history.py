"""What changed under a run between its starts: said once, and kept in `history.jsonl`, a line for each start."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from pixart.checkpoint.files import checkpoints
from pixart.config import dump_yaml, load_config, meaning
from pixart.cpu import uses_onednn
from pixart.data.training_set import Data
from pixart.errors import InputError
from pixart.files import append_rows, read_rows, write_text
from pixart.train.config import TrainConfig
from pixart.train.optimizer import learning_rate
from pixart.train.state import TrainState

FILE, CONFIG = "history.jsonl", "config.yaml"
Changes = Mapping[str, tuple[Any, Any]]  # dotted key → the value before and now
ENCODERS = ("text.model", "vae.source")  # may lie elsewhere when a run goes on, if their weights are the same


def read_run_config(run: Path) -> TrainConfig:
    """A run's stored configuration, with the split and the draws that it has, also where it was begun before these
    settings: then its `seed` divided it, and its numbers were drawn in order.

    Raises:
        InputError: it is not there, or cannot be read.
    """
    config = load_config(TrainConfig, run / CONFIG, run_code=False)
    return _settle(config, config.seed, "in_order")


def settle_draws(config: TrainConfig) -> tuple[TrainConfig, list[str]]:
    """The configuration with `data.split_seed` and `data.draws` set: as given, else those of the run that goes on, else
    those of a new one.

    Returns:
        with what is worth telling, as lines.
    """
    run = Path(config.output)
    if not (run / CONFIG).exists() or not checkpoints(run):
        return _settle(config, 0, "by_name"), []
    stored = load_config(TrainConfig, run / CONFIG, run_code=False).data
    before = read_run_config(run).data
    settled = _settle(config, before.split_seed, before.draws)
    old = []
    if stored.split_seed is None and config.data.validation:
        old.append(f"held-out images and their noise depended on seed: data.split_seed {settled.data.split_seed}")
    if stored.draws is None:
        old.append(f"a sample's random numbers were drawn in one order, not by name: data.draws {settled.data.draws}")
    return settled, [f"this run was begun when {what}; it keeps that" for what in old]


def _settle(config: TrainConfig, split_seed: int, draws: str) -> TrainConfig:
    data = config.data
    return replace(config, data=replace(
        data, split_seed=split_seed if data.split_seed is None else data.split_seed, draws=data.draws or draws
    ))  # fmt: skip


def read_encoders(run: Path) -> dict[str, str]:
    """Fingerprints of the encoders that a run was last started with, by `ENCODERS`; none before this was kept."""
    return next((row["encoders"] for row in reversed(list(read_rows(run / FILE))) if "encoders" in row), {})


def check_encoders(run: Path, config: TrainConfig, changes: Changes, weights: Mapping[str, str]) -> list[str]:
    """Compare the encoders' fingerprints with those of the run's start before, if it tells any.

    Returns:
        a line for each encoder whose place now holds other weights.

    Raises:
        InputError: an encoder was moved, and the one at its new place has other weights.
    """
    notes, before = [], read_encoders(run)
    places = {"text.model": config.text.model, "vae.source": config.vae.source}
    for key, place in places.items():
        if key not in before or weights.get(key, before[key]) == before[key]:
            continue
        what = (
            f"{key}: the weights at {place} are not those that {run} was trained with (fingerprint {before[key]} then, "
            f"{weights[key]} now)"
        )
        if key in changes:
            raise InputError(f"{what}; name those, wherever they are, or choose another output for a new run")
        notes.append(f"warning: {what}; the run goes on with them, and {FILE} says so")
    return notes


def note_start(
    run: Path, state: TrainState, config: TrainConfig, changes: Changes, data: Data, encoders: Mapping[str, str],
    given: Sequence[str] = (),
) -> list[str]:  # fmt: skip
    """Add a line for this start, and make its configuration the run's; the main process alone calls it.

    `given` says what the caller brought from Python, which the configuration does not tell.

    Returns:
        what its user should know of changes, a line each.
    """
    step = state.progress.step
    told = {key: pair for key, pair in changes.items() if meaning(TrainConfig, key, "resume") != "quiet"}
    notes = [f"changed: {key} {before!r} → {now!r}" for key, (before, now) in told.items()]
    if "train.steps" in changes and config.optimizer.schedule != "constant":
        notes.append(_of_learning_rate(config, step, changes["train.steps"][0]))
    row = {
        "step": step, "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "processes": state.processes.count,
        "onednn": uses_onednn(state.parts.network), "images": len(data.train), "samples": data.fingerprint,
        "held_out_images": len(data.held_out), "held_out": data.held_out_fingerprint, "encoders": dict(encoders),
        "changed": told, "given": list(given),
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
