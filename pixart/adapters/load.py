"""Models with an adapter in files: a folder of the adapter alone, which names its base; and any other model."""

import json
import warnings
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pixart.adapters.adapter import AdapterConfig, adapt
from pixart.adapters.base import other_base
from pixart.arguments import checked
from pixart.checkpoint import load as plain
from pixart.checkpoint.files import ModelCard, compare_shapes, newest_checkpoint, save_tensors
from pixart.checkpoint.weights import find_state, read_payload
from pixart.config import build, build_written, differences, to_dict
from pixart.errors import InputError
from pixart.extensions import load_extensions
from pixart.files import read_json
from pixart.model.pixart import PixArt

WEIGHTS, CONFIG = "adapter.safetensors", "adapter.json"


def save_adapter(
    folder: Path, state: dict[str, Tensor], config: AdapterConfig, card: ModelCard, base: str, base_weights: str
) -> None:
    """Write an adapter's folder: its tensors, and what it needs to be put on its base again.

    `base` is where the network it was trained on came from, `base_weights` that network's mark, see `mark_base`.

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
    """An adapter's kind, the card of the model with it, its base and that base's mark."""
    path = folder / CONFIG
    settings = read_json(path, what="the adapter's settings")
    if missing := [key for key in ("adapter", "card", "base", "base_weights") if key not in settings]:
        raise InputError(f"{path}: the adapter's settings have no {', '.join(missing)}")
    found = settings["adapter"], settings["card"], str(settings["base"]), str(settings["base_weights"])
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
    """Load a PixArt in eval mode from any format; its config is determined from its files.

    No parameter requires a gradient: call `requires_grad_(True)` to train. On the CPU, weights in safetensors files
    stay memory-mapped: while the model is in use, such a file may be replaced but must not be modified in place.

    Args:
        source: an official .pth or training checkpoint; a diffusers transformer or pipeline folder, or one of its
            files; a model, adapter or run in our format; or on the Hub owner/name, owner/name/subfolder or
            owner/name/file.pth.
        ema: whether to load the averaged weights if the source has averaged and raw ones.
        dtype: by default that of the files, which must then all agree.
        device: the CPU by default.
        overrides: fields of `PixArtConfig` that the file does not determine, e.g. {"num_heads": 12}.
        revision: of a Hub repository: a branch, tag or commit.
        extensions: Python files that register the variants that the model uses, see `pixart.extensions`.
        base: for an adapter, where its base is, if not at the place that the adapter names.

    Raises:
        InputError: nothing there, not a PixArt, or incomplete; names files, tensors, shapes and the likely cause.
    """
    return load_with_card(
        source,
        ema=ema,
        dtype=dtype,
        device=device,
        overrides=overrides,
        revision=revision,
        extensions=extensions,
        base=base,
    )[0]


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
    if folder is None:
        if base is not None:
            raise InputError(f"base: {source} is no adapter; leave base out")
        return plain.load_with_card(source, ema=ema, overrides=overrides, dtype=dtype, device=device, revision=revision)
    network, config, card = _load_base(source, folder, base, overrides=overrides, dtype=dtype, device=device)
    adapter = adapt(network, config)
    load_adapter(adapter, folder / WEIGHTS)
    parameter = next(network.parameters())
    adapter.to(parameter.device, parameter.dtype).eval().requires_grad_(False)
    network.card = card
    return network.eval(), card


def load_merged(source: str | Path, *, ema: bool = True, **options: Any) -> tuple[PixArt, ModelCard]:
    """As `load_with_card`, but an adapter `lora` is merged into its base's weights, so that any format can hold it.

    Raises:
        InputError: as there.
    """
    folder = find_adapter(source, ema=ema)
    if folder is None or read_settings(folder)[0].kind != "lora":
        return load_with_card(source, ema=ema, **options)
    from pixart.adapters.apply import merge
    from pixart.adapters.lora_files import read_lora

    load_extensions(options.pop("extensions", ()))
    options.pop("revision", None)  # of a repository; the base is what the adapter names
    network, _, card = _load_base(source, folder, None, **options)
    merge(network, replace(read_lora(folder), base_weights=None))  # which `_load_base` has compared
    network.card = card
    return network.eval(), card


def _load_base(
    source: str | Path, folder: Path, base: str | Path | None, **options: Any
) -> tuple[PixArt, AdapterConfig, ModelCard]:
    """The network under the adapter in `folder`, as that adapter's run had it, and the adapter's settings.

    Warns and raises as `load_with_card`.
    """
    config, card, named, weights = read_settings(folder)
    # which no tensor shows, so an official file of another width than the presets' does not say it
    options["overrides"] = {"num_heads": card.model.num_heads, **(options.get("overrides") or {})}
    try:
        network, _ = plain.load_with_card(base or named, **options)
    except InputError as error:
        raise InputError(f"{source}: an adapter, whose base is missing: {error}. Give it with base=") from None
    network = _with_config(network, card)
    if found := other_base(weights, network):
        warnings.warn(
            f"{source}: its base {base or named} has other weights than the one it was trained on "
            f"(fingerprint {weights} then, {found} now)",
            stacklevel=3,
        )
    return network, config, card


def load_adapter(adapter: torch.nn.Module, path: Path) -> None:
    """Put a file's tensors into an adapter. Raises InputError where names or shapes differ."""
    state = find_state(read_payload(path), path, ema=True)
    found = {name: tuple(tensor.shape) for name, tensor in state.items()}
    expected = {name: tuple(tensor.shape) for name, tensor in adapter.state_dict().items()}
    if difference := compare_shapes(expected, found):
        raise InputError(f"{path} does not fit the adapter of its settings; {difference}")
    adapter.load_state_dict(state)


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
    other.from_half = getattr(network, "from_half", False)
    return other.requires_grad_(False)
