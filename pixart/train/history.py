"""What changed between the starts of a run: reported once, and stored in `history.jsonl`, one line per start."""

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
ENCODERS = ("text.model", "vae.source")  # paths that may change when a run resumes, if the weights are the same


def read_run_config(run: Path) -> TrainConfig:
    """A run's stored configuration, with `data.split_seed` and `data.draws` set. A run that is older than these
    settings was split by its `seed`, and its random numbers were drawn in order.

    Raises:
        InputError: it is missing or cannot be read.
    """
    config = load_config(TrainConfig, run / CONFIG, run_code=False)
    return _settle(config, config.seed, "in_order")


def has_config(run: Path) -> bool:
    """Whether a folder holds a run.

    Raises:
        InputError: the folder exists but cannot be read, so the answer is unknown.
    """
    try:
        (run / CONFIG).stat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as error:
        raise InputError(
            f"output {run}: cannot be read ({error}); is its disk mounted, and do you have permission?"
        ) from None
    return True


def settle_draws(config: TrainConfig) -> tuple[TrainConfig, list[str]]:
    """The configuration with `data.split_seed` and `data.draws` set: as given, else as in the run that is resumed, else
    as for a new run.

    Returns:
        the configuration, and notes for the user.
    """
    run = Path(config.output)
    if not has_config(run) or not checkpoints(run):
        return _settle(config, 0, "by_name"), []
    stored = load_config(TrainConfig, run / CONFIG, run_code=False).data
    before = read_run_config(run).data
    settled = _settle(config, before.split_seed, before.draws)
    old = []
    if stored.split_seed is None and config.data.validation:
        old.append(f"held-out images and their noise depended on seed (data.split_seed {settled.data.split_seed})")
    if stored.draws is None:
        old.append(f"a sample's random numbers were drawn in order, not by name (data.draws {settled.data.draws})")
    return settled, [f"this run was started by a version in which {what}; it keeps that" for what in old]


def _settle(config: TrainConfig, split_seed: int, draws: str) -> TrainConfig:
    data = config.data
    return replace(
        config,
        data=replace(
            data, split_seed=split_seed if data.split_seed is None else data.split_seed, draws=data.draws or draws
        ),
    )


def read_encoders(run: Path) -> dict[str, str]:
    """Fingerprints of the encoders of a run's last start, by their keys in `ENCODERS`; empty in runs of versions that
    did not store them."""
    return next((row["encoders"] for row in reversed(list(read_rows(run / FILE))) if "encoders" in row), {})


def check_encoders(run: Path, config: TrainConfig, changes: Changes, weights: Mapping[str, str]) -> list[str]:
    """Compare the encoders' fingerprints with those of the run's previous start, if it stored any.

    Returns:
        a warning for each encoder whose path is the same but now holds other weights.

    Raises:
        InputError: the path of an encoder changed, and the one at the new path has other weights.
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
            raise InputError(f"{what}; give the path of the original weights, or choose another output for a new run")
        notes.append(f"warning: {what}; the run continues with the new ones, as recorded in {FILE}")
    return notes


def note_start(
    run: Path,
    state: TrainState,
    config: TrainConfig,
    changes: Changes,
    data: Data,
    encoders: Mapping[str, str],
    given: Sequence[str] = (),
) -> list[str]:
    """Add a line for this start, and store its configuration as the run's; only the main process calls it.

    `given` names what the caller passed from Python, which the configuration does not show.

    Returns:
        the changes that the user should know of, one per line.
    """
    step = state.progress.step
    told = {key: pair for key, pair in changes.items() if meaning(TrainConfig, key, "resume") != "quiet"}
    notes = [f"changed: {key} {before!r} → {now!r}" for key, (before, now) in told.items()]
    if "train.steps" in changes and config.optimizer.schedule != "constant":
        notes.append(_of_learning_rate(config, step, changes["train.steps"][0]))
    row = {
        "step": step,
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "processes": state.processes.count,
        "onednn": uses_onednn(state.parts.network),
        "images": len(data.train),
        "samples": data.fingerprint,
        "held_out_images": len(data.held_out),
        "held_out": data.held_out_fingerprint,
        "encoders": dict(encoders),
        "contents": data.contents,
        "changed": told,
        "given": list(given),
    }
    earlier = [old for old in read_rows(run / FILE) if old["step"] < step]  # starts that did at least one step
    parts = ("training data", "samples", "images"), ("held-out images", "held_out", "held_out_images")
    for what, key, count in parts:
        before = [old for old in earlier if key in old]
        if before and before[-1][key] != row[key]:
            notes.append(
                f"warning: the {what} are not those of the steps so far ({before[-1][count]} images then, {row[count]} "
                f"now); the run continues with the new ones, as recorded in {FILE}"
            )
    if before := [old for old in earlier if "contents" in old and all(old[key] == row[key] for _, key, _ in parts)]:
        then = before[-1]["contents"]
        for what in (what for what, print in data.contents.items() if then.get(what, print) != print):
            notes.append(
                f"warning: the {what} are not those of the steps so far, under the same names; the run continues with "
                f"the new ones, as recorded in {FILE}"
            )
    try:
        write_text(run / CONFIG, dump_yaml(config))
        append_rows(run / FILE, [row])
    except OSError as error:
        notes.append(f"warning: {CONFIG} or {FILE} in {run} could not be written ({error}); training continues")
    return notes


def _of_learning_rate(config: TrainConfig, step: int, steps: int) -> str:
    was, now = (
        learning_rate(c.optimizer, step, c.train.steps, c.train.batch_size)
        for c in (replace(config, train=replace(config.train, steps=steps)), config)
    )
    return (
        f"optimizer.schedule {config.optimizer.schedule} ends at train.steps, which changed: the next step's learning "
        f"rate is {now:.3g}; with {steps} steps it would have been {was:.3g}"
    )
