"""Our own files: a model is a folder with `model.safetensors` and `config.json`; a run has checkpoints of two."""

import json
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
from pixart.files import verify
from pixart.model.pixart import PixArtConfig

WEIGHTS, CONFIG = "model.safetensors", "config.json"


@dataclass(frozen=True)
class ModelCard:
    """All that sampling from a model needs besides its weights; the sections of `config.json`, which holds what differs
    from the defaults."""

    model: PixArtConfig = field(default_factory=PixArtConfig)
    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)
    vae: AutoencoderConfig = field(default_factory=AutoencoderConfig)
    text: TextConfig = field(default_factory=TextConfig)
    sample: SampleConfig = field(default_factory=SampleConfig)  # a recommendation


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
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read ({error})") from None
    try:
        return build_written(ModelCard, settings)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None


def compare_shapes(expected: dict[str, tuple[int, ...]], found: dict[str, tuple[int, ...]]) -> str:
    """What differs between two sets of named shapes, "" if nothing."""
    parts = []
    if missing := sorted(set(expected) - set(found)):
        parts.append(f"missing: {_some(missing)}")
    if unknown := sorted(set(found) - set(expected)):
        parts.append(f"unknown: {_some(unknown)}")
    if wrong := [f"{n} {found[n]}, expected {expected[n]}" for n in expected if n in found and found[n] != expected[n]]:
        parts.append(f"of another shape: {_some(wrong)}")
    return "; ".join(parts)


def find_model(source: Path, *, ema: bool = True) -> Path:
    """The model folder that `source` means: itself, a checkpoint's, or a run's newest good checkpoint's."""
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
    """A run's complete checkpoints, oldest first."""
    return sorted(path for path in (run / "checkpoints").glob("step_*") if path.is_dir())


def newest_checkpoint(run: Path, warn: Callable[[str], None]) -> Path | None:
    """The newest checkpoint whose files have the sizes and hashes of its manifest; damaged ones are named."""
    for path in reversed(checkpoints(run)):
        damage = verify(path)
        if damage is None:
            return path
        warn(f"warning: checkpoint {path} is damaged ({damage}); trying the one before it")
    return None


def _some(names: list[str], limit: int = 5) -> str:
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")
