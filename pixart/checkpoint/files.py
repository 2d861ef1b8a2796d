"""Our own format: a model is a folder with `model.safetensors` and `config.json`; a run's checkpoint holds two models,
the raw and the averaged weights."""

import json
import os
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from pixart.config import build_written, differences
from pixart.diffusion.sampling import SampleConfig
from pixart.diffusion.schedule import DiffusionConfig
from pixart.encoders.autoencoder import AutoencoderConfig
from pixart.encoders.text import TextConfig
from pixart.errors import InputError
from pixart.files import read_json, verify
from pixart.model.pixart import PixArtConfig

WEIGHTS, CONFIG = "model.safetensors", "config.json"


@dataclass(frozen=True)
class ModelCard:
    """Everything that sampling needs besides weights. `config.json` has these sections; it stores only what differs
    from the defaults."""

    model: PixArtConfig = field(default_factory=PixArtConfig)
    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)
    vae: AutoencoderConfig = field(default_factory=AutoencoderConfig)
    text: TextConfig = field(default_factory=TextConfig)
    sample: SampleConfig = field(default_factory=SampleConfig)  # recommended settings


def save_model(folder: Path, state: dict[str, Tensor], card: ModelCard) -> None:
    """Write a model folder. Tensors keep their dtype.

    Raises:
        OSError: the disk is full, or the folder cannot be written.
    """
    save_tensors(folder / WEIGHTS, state)
    (folder / CONFIG).write_text(json.dumps(differences(card), indent=2) + "\n", encoding="utf-8")


def save_tensors(path: Path, state: dict[str, Tensor]) -> None:
    """Write a safetensors file, and the folder it lies in. Raises OSError as `save_model`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        save_file({name: tensor.contiguous() for name, tensor in state.items()}, path)
    except SafetensorError as error:  # the library's own type for an I/O error
        raise OSError(str(error)) from None


def read_card(folder: Path, name: str = CONFIG) -> ModelCard:
    path = folder / name
    settings = read_json(path)
    try:
        return build_written(ModelCard, settings)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None


def compare_shapes(expected: dict[str, tuple[int, ...]], found: dict[str, tuple[int, ...]]) -> str:
    """The differences between two sets of named shapes, in words; "" if there are none."""
    parts = []
    if missing := sorted(set(expected) - set(found)):
        parts.append(f"missing: {_some(missing)}")
    if unknown := sorted(set(found) - set(expected)):
        parts.append(f"unknown: {_some(unknown)}")
    if wrong := [f"{n} {found[n]}, expected {expected[n]}" for n in expected if n in found and found[n] != expected[n]]:
        parts.append(f"of another shape: {_some(wrong)}")
    return "; ".join(parts)


def find_model(source: Path, *, ema: bool = True) -> Path:
    """The model folder that `source` refers to: itself, or in a checkpoint, or in a run's newest intact checkpoint.

    Raises:
        InputError: there is none, or not with the weights asked for.
    """
    kind = "ema" if ema else "model"
    if (source / WEIGHTS).exists():
        return source
    if (source / kind / WEIGHTS).exists():
        return source / kind
    if (source / "checkpoints").is_dir():
        checkpoint = newest_checkpoint(source, print)
        if checkpoint is None:
            raise InputError(f"run {source} has no good checkpoint yet")
        return find_model(checkpoint, ema=ema)
    if ema and (source / "model" / WEIGHTS).exists():
        raise InputError(f"{source} has no averaged weights; ask for the raw ones (--raw, ema=False)")
    raise InputError(f"no model at {source}: expected a folder with {WEIGHTS} and {CONFIG}, or a run with checkpoints")


def checkpoints(run: Path) -> list[Path]:
    """A run's complete checkpoints, oldest first. Folders with other names, such as copies, are ignored.

    Raises:
        InputError: their folder exists but cannot be read.
    """
    found, folder = [], run / "checkpoints"
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                match = re.fullmatch(r"step_(\d{8,})", entry.name)
                if match and entry.name == step_name(int(match[1])) and entry.is_dir():
                    found.append((int(match[1]), folder / entry.name))
    except FileNotFoundError:
        return []
    except OSError as error:
        raise InputError(f"{folder}: cannot be read ({error}); is its disk there, and are you allowed to?") from None
    return [path for _, path in sorted(found)]


def step_name(step: int) -> str:
    """The folder name of a step's checkpoint."""
    return f"step_{step:08d}"


def newest_checkpoint(run: Path, warn: Callable[[str], None]) -> Path | None:
    """The newest checkpoint whose files match the hashes of its manifest; warns of damaged and unreadable ones."""
    for path in reversed(checkpoints(run)):
        damage = verify(path)
        if damage is None:
            return path
        what = damage if "cannot be read:" in damage else f"is damaged ({damage})"
        warn(f"warning: checkpoint {path} {what}; trying the one before it")
    return None


def _some(names: list[str], limit: int = 5) -> str:
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")
