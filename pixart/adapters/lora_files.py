"""LoRA files of every tool → changes of our weights, and back. Formats are recognised by their content.

In: PEFT's folders (also the authors' scripts' and their second copy for diffusers), files of diffusers, kohya's scripts
and OneTrainer, LyCORIS' LoRA, LoHa, LoKr and whole differences, and the adapters `lora` of our runs. Out: PEFT,
diffusers and kohya, with the strength folded into the matrices (α = r), so that all readers agree on it.
"""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from pixart.adapters.base import is_mark
from pixart.adapters.changes import Change, LowRank, fuse, split
from pixart.adapters.lora import scale_of, to_module
from pixart.adapters.lora_names import Place, their_names
from pixart.adapters.lora_tensors import interpret
from pixart.checkpoint.locate import locate
from pixart.checkpoint.weights import find_state, read_payload
from pixart.errors import InputError
from pixart.files import read_json, write_file, write_folder

PEFT_WEIGHTS, PEFT_CONFIG = ("adapter_model.safetensors", "adapter_model.bin"), "adapter_config.json"
DIFFUSERS_WEIGHTS = ("pytorch_lora_weights.safetensors", "pytorch_lora_weights.bin")
FORMATS = ("peft", "diffusers-lora", "kohya")
BASE_WEIGHTS = "pixart_base_weights"  # in the header of files that we write


@dataclass(frozen=True)
class LoraFile:
    """An adapter as changes of our weights."""

    changes: dict[Place, Change]
    format: str  # peft, diffusers, kohya, lycoris or ours
    base: str | None = None  # the model it was trained on, if the file tells
    about: dict[str, str] = field(default_factory=dict)  # trigger words and the like, as metadata tells
    base_weights: str | None = None  # the mark of the base, in files of ours

    @property
    def modules(self) -> list[str]:
        """Our modules that it changes, sorted."""
        return sorted({place.module for place in self.changes})


def read_lora(source: str | Path, *, ema: bool = True) -> LoraFile:
    """Read an adapter: a file, a folder of PEFT, diffusers or LyCORIS, or a run, checkpoint or adapter of ours.

    Raises:
        InputError: it is a model and no adapter, of another model, damaged, or has tensors that fit nothing; all of
            these are named.
    """
    source = Path(source)
    if not source.exists():
        raise InputError(f"{source}: no such file or folder; expected a LoRA")
    from pixart.adapters.load import find_adapter

    if (folder := find_adapter(source, ema=ema)) is not None:
        return _read_ours(folder)
    path, settings = _locate(source)
    state, metadata = _read(path)
    if "lora_adapter_metadata" in metadata:
        settings = settings or _from_header(metadata["lora_adapter_metadata"], path)
    changes = interpret(state, settings, path)
    about = {key: value for key, value in metadata.items() if re.search("trigger|title|author|tag_frequency", key)}
    base = settings.get("base_model_name_or_path") or metadata.get("ss_sd_model_name")
    mark = metadata.get(BASE_WEIGHTS, "")
    return LoraFile(changes, _format_of(state, path), base, about, mark if is_mark(mark) else None)


def name_lora(source: Path) -> str:
    """The name by which an adapter is called unless it is given one: its file's or folder's."""
    return source.stem if source.is_file() else source.name


def _locate(source: Path) -> tuple[Path, dict[str, Any]]:
    """The file of weights, and PEFT's settings if there are any."""
    if source.is_file():
        config = source.parent / PEFT_CONFIG
        # the authors' second copy lies in a folder beside the one with the settings
        other = source.parent.parent / "transformer_lora" / PEFT_CONFIG
        known = source.name in PEFT_WEIGHTS + DIFFUSERS_WEIGHTS
        found = next((path for path in (config, source.parent.parent / PEFT_CONFIG, other) if path.is_file()), None)
        return source, read_json(found) if known and found else {}
    for name in PEFT_WEIGHTS + DIFFUSERS_WEIGHTS:
        if (source / name).is_file():
            return _locate(source / name)
    files = sorted(path for path in source.iterdir() if path.suffix in (".safetensors", ".pt", ".bin", ".ckpt"))
    if len(files) == 1:
        return _locate(files[0])
    if _is_model(source):
        raise InputError(f"{source}: this is a model, not a LoRA; give it as the model (--model)")
    listed = ", ".join(path.name for path in files[:4]) or "no file of weights"
    raise InputError(f"{source}: expected a LoRA, as {PEFT_WEIGHTS[0]} or {DIFFUSERS_WEIGHTS[0]}; found {listed}")


def _is_model(folder: Path) -> bool:
    """Whether it is a run or a folder of a model, whose weights may lie deeper."""
    try:
        locate(folder)
    except InputError:
        return False
    return True


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    state = find_state(read_payload(path), path, ema=True)
    metadata: dict[str, str] = {}
    if path.suffix == ".safetensors":
        with safe_open(str(path), "pt") as file:
            metadata = dict(file.metadata() or {})
    return state, metadata


def _from_header(text: str, path: Path) -> dict[str, Any]:
    """PEFT's settings from the header of diffusers' file, whose keys begin with the model's part."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        raise InputError(f"{path}: its header's lora_adapter_metadata is not valid JSON") from None
    if not isinstance(found, dict):
        raise InputError(f"{path}: its header's lora_adapter_metadata: expected keys and values, got {found!r}")
    return {key.removeprefix("transformer."): value for key, value in found.items()}


def _format_of(state: Mapping[str, Tensor], path: Path) -> str:
    names = list(state)
    if any(re.search(r"hada_w|lokr_|\.diff(_b)?$|^lycoris_", name) for name in names):
        return "lycoris"
    if any(re.search(r"lora_(down|up)\.weight$", name) for name in names):
        return "kohya"
    return "peft" if path.name in PEFT_WEIGHTS else "diffusers"


def _read_ours(folder: Path) -> LoraFile:
    from pixart.adapters.load import CONFIG, WEIGHTS, read_settings

    config, _, base, mark = read_settings(folder)
    if config.kind != "lora":
        raise InputError(f"{folder / CONFIG}: an adapter '{config.kind}', expected lora; no other tool knows this kind")
    state, options = find_state(read_payload(folder / WEIGHTS), folder / WEIGHTS, ema=True), config.options
    changes: dict[Place, Change] = {}
    for key in dict.fromkeys(name.split(".")[1] for name in state):
        down, up = state[f"layers.{key}.down"], state[f"layers.{key}.up"]
        scale = scale_of(options.get("alpha") or len(down), len(down), bool(options.get("rslora")))
        changes[Place(to_module(key), 0, 1)] = LowRank(down, up, scale, state.get(f"layers.{key}.magnitude"))
    return LoraFile(changes, "ours", base, base_weights=mark if is_mark(mark) else None)


# ------------------------------------------------------------------------------------------------------------- out


def write_lora(lora: LoraFile, target: str | Path, format: str) -> None:
    """Write an adapter for other tools: "peft" and "diffusers-lora" are folders, "kohya" is one .safetensors.

    Raises:
        InputError: the target exists or has the wrong form, or the format has no place for what the adapter changes.
        OSError: the disk is full, or the target cannot be written.
    """
    target = Path(target)
    if target.exists():
        raise InputError(f"{target} exists; choose a new {'file' if format == 'kohya' else 'folder'}")
    if (target.suffix == ".safetensors") != (format == "kohya"):
        expected = "a file NAME.safetensors" if format == "kohya" else "a folder"
        raise InputError(f"{target}: the format {format} is {expected}")
    if format == "kohya":
        tensors, ranks = _to_kohya(lora)
        metadata = {
            "format": "pt", "ss_network_module": "networks.lora", "ss_network_dim": str(max(ranks)),
            "ss_network_alpha": str(max(ranks)), "ss_base_model_version": "pixart", **_about(lora),
        }  # fmt: skip
        write_file(target, lambda path: save_file(tensors, path, metadata))
        return
    parts = _to_parts(lora)
    tensors = {}
    prefix = "base_model.model." if format == "peft" else "transformer."
    for name, change in parts.items():
        tensors[f"{prefix}{name}.lora_A.weight"] = _own(_shaped(change.down, name))
        up = change.folded().up
        tensors[f"{prefix}{name}.lora_B.weight"] = _own(up[:, :, None, None] if _is_conv(name) else up)
        if change.magnitude is not None:
            magnitude = change.magnitude.view(1, -1, 1, 1) if _is_conv(name) else change.magnitude
            tensors[f"{prefix}{name}.lora_magnitude_vector"] = _own(magnitude)
    settings = peft_settings(parts, lora.base)
    if format == "peft":

        def write(folder: Path) -> None:
            save_file(tensors, folder / PEFT_WEIGHTS[0], {"format": "pt", **_about(lora)})
            (folder / PEFT_CONFIG).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    else:
        header = json.dumps({f"transformer.{key}": value for key, value in settings.items()}, sort_keys=True)

        def write(folder: Path) -> None:
            metadata = {"format": "pt", "lora_adapter_metadata": header, **_about(lora)}
            save_file(tensors, folder / DIFFUSERS_WEIGHTS[0], metadata)

    write_folder(target, write, manifest=False)


def peft_settings(parts: Mapping[str, LowRank], base: str | None) -> dict[str, Any]:
    """PEFT's adapter_config.json of matrices whose strength is folded in: α = r everywhere."""
    ranks = {name: change.rank for name, change in parts.items()}
    rank = max(ranks.values())
    pattern = {name: found for name, found in ranks.items() if found != rank}
    return {
        "peft_type": "LORA", "task_type": None, "base_model_name_or_path": base, "inference_mode": True, "r": rank,
        "lora_alpha": rank, "rank_pattern": pattern, "alpha_pattern": pattern, "target_modules": sorted(ranks),
        "lora_dropout": 0.0, "bias": "none", "use_dora": any(c.magnitude is not None for c in parts.values()),
        "use_rslora": False, "fan_in_fan_out": False, "init_lora_weights": True, "modules_to_save": None,
    }  # fmt: skip


def _to_parts(lora: LoraFile) -> dict[str, LowRank]:
    """Changes under diffusers' names.

    Raises:
        InputError: one of them is no LoRA.
    """
    found: dict[str, LowRank] = {}
    for place, change in lora.changes.items():
        names = their_names(place.module)
        if not isinstance(change, LowRank) or place.tensor != "weight":
            raise InputError(
                f"{place.module}: a {type(change).__name__} has no place in LoRA files; merge it into its base, "
                "with --to of a model's format and --lora"
            )
        if change.by_columns:
            raise InputError(f"{place.module}: DoRA by columns has no place in PEFT's files; merge it into its base")
        if place.parts == len(names) and place.parts > 1:
            found[names[place.part]] = change
        else:
            found |= dict(zip(names, split(change, len(names), place.module), strict=True))
    return found


def _to_kohya(lora: LoraFile) -> tuple[dict[str, Tensor], list[int]]:
    tensors: dict[str, Tensor] = {}
    ranks = []
    for module in lora.modules:
        here = {place: change for place, change in lora.changes.items() if place.module == module}
        if any(place.tensor != "weight" or not isinstance(change, LowRank) for place, change in here.items()):
            raise InputError(f"{module}: only LoRA has a place in this format; merge the adapter into its base")
        first = next(iter(here))
        parts = [here.get(first._replace(part=part)) for part in range(first.parts)]
        change = fuse(parts, module).folded()
        name = f"lora_unet_{module.replace('.', '_')}"
        theirs = their_names(module)[0]
        tensors[f"{name}.lora_down.weight"] = _own(_shaped(change.down, theirs))
        tensors[f"{name}.lora_up.weight"] = _own(change.up[:, :, None, None] if _is_conv(theirs) else change.up)
        tensors[f"{name}.alpha"] = torch.tensor(float(change.rank))
        if change.magnitude is not None:
            tensors[f"{name}.dora_scale"] = _own(change.magnitude.reshape(-1, *[1] * (change.down.ndim - 1)))
        ranks.append(change.rank)
    return tensors, ranks


def _is_conv(name: str) -> bool:
    """Whether diffusers' module is the patch convolution."""
    return name == "pos_embed.proj"


def _shaped(down: Tensor, name: str) -> Tensor:
    """A as the layer has it: of a convolution (r, C, p, p). Ours is flat; the patch is square, of 3 or 4 channels."""
    if not _is_conv(name) or down.ndim == 4:
        return down
    for channels in (4, 3, 16):
        side = math.isqrt(down.shape[1] // channels)
        if channels * side * side == down.shape[1]:
            return down.reshape(len(down), channels, side, side)
    raise InputError(f"{name}: width {down.shape[1]} is no square patch of 3, 4 or 16 channels")


def _own(tensor: Tensor) -> Tensor:
    return tensor.detach().float().contiguous().clone()


def _about(lora: LoraFile) -> dict[str, str]:
    base = {"ss_sd_model_name": lora.base, BASE_WEIGHTS: lora.base_weights}
    return {**{key: value for key, value in base.items() if value}, **lora.about}
