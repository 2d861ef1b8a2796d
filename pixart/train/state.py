"""What a resume needs, as one record; saving and restoring it."""

import random
import shutil
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from torch import nn

from pixart.checkpoint.files import WEIGHTS, check_state, checkpoints, save_model
from pixart.disk import write_folder
from pixart.errors import InputError
from pixart.model.pixart import PixArt
from pixart.train.config import TrainConfig

STATE = "training.pt"


@dataclass
class Progress:
    """Counters of a run. Global batches taken from the data equal optimizer steps tried, so `tried` is the position."""

    step: int = 0  # optimizer steps tried; what schedules, intervals and the data order count in
    skipped: int = 0  # of them not applied, for a non-finite loss or gradient
    skipped_in_row: int = 0
    images: int = 0
    seconds: float = 0.0  # of training, over all starts
    unreadable: dict[str, str] = field(default_factory=dict)  # id → reason of images met and skipped


@dataclass
class TrainState:
    """A run's state: everything that a checkpoint holds."""

    model: PixArt
    wrapped: nn.Module  # the model as accelerate wrapped it; the same object in one process
    ema: nn.Module
    optimizer: torch.optim.Optimizer  # as accelerate wrapped it
    accelerator: Accelerator
    progress: Progress = field(default_factory=Progress)


def save_checkpoint(state: TrainState, config: TrainConfig, run: Path) -> Path:
    """Write `checkpoints/step_…` whole or not at all, then remove the oldest beyond `keep`; all processes call it.

    Raises:
        OSError: disk full or not writable, on every process; earlier checkpoints are untouched.
    """
    target = run / "checkpoints" / f"step_{state.progress.step:08d}"
    accelerator = state.accelerator
    failure = torch.zeros(1, device=accelerator.device)
    error: OSError | None = None
    if accelerator.is_main_process:
        try:
            write_folder(target, lambda folder: _fill(folder, state, config))
            for old in checkpoints(run)[: -config.train.keep]:
                shutil.rmtree(old)
        except OSError as caught:
            error = caught
            failure += 1
    if accelerator.reduce(failure).item():
        raise error or OSError("the main process could not write the checkpoint")
    return target


def _fill(folder: Path, state: TrainState, config: TrainConfig) -> None:
    save_model(folder / "model", state.model.state_dict(), config.card)
    save_model(folder / "ema", state.ema.state_dict(), config.card)
    scaler = state.accelerator.scaler
    record = {
        "optimizer": state.optimizer.state_dict(),
        "scaler": scaler.state_dict() if scaler is not None else None,
        "progress": vars(state.progress),
        "rng": _rng_state(),
    }
    try:
        torch.save(record, folder / STATE)
    except RuntimeError as error:  # torch's own type for an I/O error
        raise OSError(f"{folder / STATE}: {error}") from None


def load_checkpoint(state: TrainState, checkpoint: Path) -> None:
    """Put a checkpoint's weights, averages, optimizer, scaler, counters and random state into `state`, bit for bit."""
    for module, name in ((state.model, "model"), (state.ema, "ema")):
        weights = load_file(checkpoint / name / WEIGHTS)
        check_state(module, weights, str(checkpoint / name / WEIGHTS))
        module.load_state_dict(weights, strict=True)
    try:
        record = torch.load(checkpoint / STATE, map_location="cpu", weights_only=True)
        state.optimizer.load_state_dict(record["optimizer"])
    except (RuntimeError, KeyError, ValueError) as error:
        raise InputError(f"{checkpoint / STATE}: does not fit this run's optimizer ({error})") from None
    if state.accelerator.scaler is not None and record["scaler"] is not None:
        state.accelerator.scaler.load_state_dict(record["scaler"])
    state.progress = Progress(**record["progress"])
    _restore_rng(record["rng"])


def _rng_state() -> dict:
    # training draws all its numbers from (seed, epoch, sample id); this is for what a user's own code draws
    version, internal, gauss = random.getstate()
    numpy = np.random.get_state()  # noqa: NPY002
    return {
        "python": [version, list(internal), gauss],
        "numpy": [numpy[0], torch.from_numpy(numpy[1].astype(np.int64)), *numpy[2:]],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def _restore_rng(rng: dict) -> None:
    version, internal, gauss = rng["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, *rest = rng["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))  # noqa: NPY002
    torch.set_rng_state(rng["torch"])
    if rng["cuda"] and len(rng["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(rng["cuda"])
