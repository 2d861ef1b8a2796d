"""Models with an adapter in files: a folder of the adapter alone, which names its base; and any other model."""

import json
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from pixart.adapters.adapter import AdapterConfig, adapt
from pixart.arguments import checked
from pixart.checkpoint import load as plain
from pixart.checkpoint.files import ModelCard, compare_shapes, newest_checkpoint, save_tensors
from pixart.config import build, build_written, differences, to_dict
from pixart.encoders.fingerprint import fingerprint
from pixart.errors import InputError
from pixart.extensions import load_extensions
from pixart.model.pixart import PixArt

WEIGHTS, CONFIG = "adapter.safetensors", "adapter.json"


def save_adapter(
    folder: Path, state: dict[str, Tensor], config: AdapterConfig, card: ModelCard, base: str, base_weights: str
) -> None:
    """Write an adapter's folder: its tensors, and what it needs to be put on its base again.

    `base` is where the network it was trained on came from, `base_weights` that network's fingerprint.

    Raises:
        OSError: the disk is full, or the folder cannot be written.
    """
    save_tensors(folder / WEIGHTS, state)
    settings = {"adapter": to_dict(config), "base": base, "base_weights": base_weights, "card": differences(card)}
    (folder / CONFIG).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def find_adapter(source: str | Path, *, ema: bool = True) -> Path | None:
    """The folder of an adapter that `source` means: itself, a checkpoint's or a run's; None where it is no adapter."""
    source, kind = Path(source), "ema" if ema else "model"
    if not source.is_dir():
        return None
    for folder in (source, source / kind):
        if (folder / CONFIG).is_file():
            return folder
    if not any(source.glob(f"checkpoints/step_*/{kind}/{CONFIG}")):
        return None
    checkpoint = newest_checkpoint(source, print)
    return None if checkpoint is None else checkpoint / kind


def read_settings(folder: Path) -> tuple[AdapterConfig, ModelCard, str, str]:
    """An adapter's kind, the card of the model with it, its base and that base's fingerprint."""
    path = folder / CONFIG
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
        found = settings["adapter"], settings["card"], str(settings["base"]), str(settings["base_weights"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path}: cannot be read ({type(error).__name__}: {error})") from None
    return build(AdapterConfig, found[0], place=f"{path}: "), build_written(ModelCard, found[1]), *found[2:]


@checked
def load_model(
    source: str | Path,
    *,
    ema: bool = True,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    overrides: dict[str, Any] | None = None,
    revision: str | None = None,
    extensions: Iterable[str | Path] = (),
    base: str | Path | None = None,
) -> PixArt:
    """Load a PixArt in eval mode, from any format, with the config that its files tell.

    No parameter requires a gradient: call `requires_grad_(True)` to train. On the CPU, weights of safetensors stay
    memory-mapped, so that file is to be replaced, not written into, while the model lives; all others are copied.

    Args:
        source: an official .pth or training checkpoint, a transformer or pipeline folder of diffusers, one of its
            files, a model, adapter or run of ours, or on the Hub owner/name, owner/name/subfolder or
            owner/name/file.pth.
        ema: of a source with averaged and raw weights, the averaged ones.
        dtype: the files' own by default, which must then be one.
        device: the CPU by default.
        overrides: fields of `PixArtConfig` that a file cannot tell, as {"num_heads": 12}.
        revision: of a Hub repository: a branch, tag or commit.
        extensions: files of one's own that register the variants it is made of, see `pixart.extensions`.
        base: of an adapter: another place of its base than it names.

    Raises:
        InputError: nothing there, not a PixArt, or not whole; names files, tensors, shapes and the likely cause.
    """
    return load_with_card(
        source, ema=ema, dtype=dtype, device=device, overrides=overrides, revision=revision, extensions=extensions,
        base=base,
    )[0]  # fmt: skip


def load_with_card(
    source: str | Path,
    *,
    ema: bool = True,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    overrides: dict[str, Any] | None = None,
    revision: str | None = None,
    extensions: Iterable[str | Path] = (),
    base: str | Path | None = None,
) -> tuple[PixArt, ModelCard]:
    """As `pixart.checkpoint.load_with_card`; the network of an adapter is its base, read and adapted.

    Args:
        base: of an adapter: another place of its base than it names.

    Warns:
        UserWarning: the base has other weights than the one that the adapter was trained on.

    Raises:
        InputError: as there, or the adapter's base is not where it names it, or it does not fit it.
    """
    load_extensions(extensions)
    folder = find_adapter(source, ema=ema)
    common = {"dtype": dtype, "device": device, "revision": revision}
    if folder is None:
        if base is not None:
            raise InputError(f"base: {source} is no adapter; leave base out")
        return plain.load_with_card(source, ema=ema, overrides=overrides, **common)
    config, card, named, weights = read_settings(folder)
    try:
        network, _ = plain.load_with_card(base or named, overrides=overrides, **{**common, "revision": None})
    except InputError as error:
        raise InputError(f"{source}: an adapter, whose base is missing: {error}. Give it with base=") from None
    network = _with_config(network, card)
    if (found := fingerprint(network)) != weights:
        warnings.warn(
            f"{source}: its base {base or named} has other weights than the one it was trained on "
            f"(fingerprint {weights} then, {found} now)",
            stacklevel=2,
        )
    adapter = adapt(network, config)
    load_adapter(adapter, folder / WEIGHTS)
    parameter = next(network.parameters())
    adapter.to(parameter.device, parameter.dtype).requires_grad_(False)
    network.card = card
    return network.eval(), card


def load_adapter(adapter: torch.nn.Module, path: Path) -> None:
    """Put a file's tensors into an adapter. Raises InputError where names or shapes differ."""
    with safe_open(path, "pt") as file:
        found = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    expected = {name: tuple(tensor.shape) for name, tensor in adapter.state_dict().items()}
    if difference := compare_shapes(expected, found):
        raise InputError(f"{path} does not fit the adapter of its settings; {difference}")
    adapter.load_state_dict(load_file(path))


def _with_config(network: PixArt, card: ModelCard) -> PixArt:
    """The base as the adapter's run had it: at another resolution, say, whose positions are computed."""
    if network.config == card.model:
        return network
    with torch.device("meta"):
        other = PixArt(card.model)
    shapes = ({name: tuple(t.shape) for name, t in m.state_dict().items()} for m in (other, network))
    if difference := compare_shapes(*shapes):
        raise InputError(f"the base is not the network of the adapter's card; {difference}")
    other.load_state_dict(network.state_dict(), assign=True)
    return other.requires_grad_(False)
