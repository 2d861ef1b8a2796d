"""Tensors in files: what a file holds by its content, memory-mapped, and never a line of its code run.

Every `Weights.read` maps the files anew. Pages that were only copied from leave memory with that map, so a load
holds each weight once.
"""

import argparse
import json
import pickle
import re
import shlex
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from pixart.errors import InputError

CARD_KEY = "pixart_card"  # JSON beside an official file's state_dict, where the defaults would misread the model
# where checkpoints keep their averaged and their raw weights: PixArt's authors, DiT's, DeepSpeed
_EMA, _RAW = ("state_dict_ema", "ema"), ("state_dict", "model", "module")
# parts of a name that wrappers add: DDP, torch.compile, ControlNet's and FSDP's modules, trainers
_WRAPPERS = {"module", "_orig_mod", "base_model", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "model"}
_FIRST = ("x_embedder.proj.weight", "pos_embed.proj.weight")  # every PixArt has one; what stands before it is a prefix


@dataclass(frozen=True)
class Weights:
    """The tensors of one model, over one file or more. Nothing is read before `read`, and then only mapped."""

    files: tuple[Path, ...]
    ema: bool = True  # of a training checkpoint with both, the averaged weights

    def read(self) -> dict[str, Tensor]:
        """Names without wrappers' prefixes → tensors in a new memory map; writing to them leaves the file alone.

        Raises:
            InputError: not files of weights, damaged, with code in them, or a name twice.
        """
        state: dict[str, Tensor] = {}
        for file in self.files:
            part = find_state(read_payload(file), file, ema=self.ema)
            if twice := sorted(state.keys() & part.keys()):
                raise InputError(f"{file}: {twice[0]} stands in another file of this model too")
            state.update(part)
        return strip_wrappers(state, self.files[0] if len(self.files) == 1 else self.files[0].parent)

    def may_stay_mapped(self) -> bool:
        """Whether a model may live on what `read` maps: torch.save cuts a file short under its map, which kills."""
        return all(sniff(file) != "zip" for file in self.files)

    def sections(self) -> list[str]:
        """Where a training checkpoint has weights, those that `read` takes first; none in a file of tensors alone."""
        return _sections(read_payload(self.files[0]), ema=self.ema)

    def card_text(self) -> str | None:
        """The card that our own export to the official format adds where needed."""
        if len(self.files) != 1 or sniff(self.files[0]) == "safetensors":
            return None
        payload = read_payload(self.files[0])
        return payload.get(CARD_KEY) if isinstance(payload, Mapping) else None


def read_payload(path: Path) -> Any:
    """What a file holds, tensors memory-mapped (but for torch files older than 1.6, which cannot be)."""
    kind = sniff(path)
    try:
        if kind == "safetensors":
            return load_file(path)
        with torch.serialization.safe_globals([argparse.Namespace]):  # a script's arguments, which are data alone
            return torch.load(path, map_location="cpu", weights_only=True, mmap=kind == "zip")
    except pickle.UnpicklingError as error:
        if found := re.search(r"GLOBAL ([\w.]+)", str(error)):
            raise InputError(
                f"{path}: refused, since loading it would run code: its pickle calls {found[1]}. {_way_out(path)}"
            ) from None
        reason = str(error).partition("WeightsUnpickler error:")[2] or str(error)
        reason = _one_line(reason.partition("Check the documentation")[0])  # which is on switching the protection off
        raise InputError(
            f"{path}: refused: damaged, or a pickle that torch.save did not write, which might run code ({reason}); "
            "fetch it again, or have its author save the tensors by torch.save or safetensors"
        ) from None
    except (OSError, EOFError, RuntimeError, ValueError, KeyError, SafetensorError, zipfile.BadZipFile) as error:
        raise InputError(
            f"{path}: truncated or damaged ({path.stat().st_size:,} bytes; {_one_line(error)}); fetch it again"
        ) from None


def _way_out(path: Path) -> str:
    """The command that takes the tensors out of a pickle with code, a pickled network's too, by section."""
    made = f"{path.stem}_tensors.pth"
    code = (
        "import sys, torch; "
        "state = lambda x: x.state_dict() if hasattr(x, 'state_dict') else x; "
        "tensors = lambda x: {k: v for k, v in state(x).items() if torch.is_tensor(v)}; "
        "p = state(torch.load(sys.argv[1], map_location='cpu', weights_only=False)); "
        f"kept = {{k: tensors(p[k]) for k in {(*_EMA, *_RAW)} if hasattr(state(p.get(k)), 'items')}}; "
        "torch.save(kept or tensors(p), sys.argv[2])"
    )
    return (
        f"If you trust its author, take the tensors out once into {made}, in an environment you can lose: "
        f'python -c "{code}" {shlex.quote(str(path))} {shlex.quote(made)}'
    )


def sniff(path: Path) -> str:
    """ "safetensors", "zip" (torch since 1.6) or "pickle" (before), by the first bytes.

    Raises:
        InputError: unreadable, or what a failed download leaves.
    """
    try:
        with open(path, "rb") as file:
            head = file.read(512)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error})") from None
    if not head:
        raise InputError(f"{path}: the file is empty; fetch it again")
    if head.startswith(b"version https://git-lfs"):
        raise InputError(f"{path}: a Git-LFS pointer, not the weights; run git lfs pull, or download the file itself")
    if head.lstrip().lower().startswith((b"<!doctype", b"<html", b"<?xml")):
        raise InputError(f"{path}: a web page, not weights; the download failed or needs a login. Fetch it again")
    if head.startswith(b"PK\x03\x04"):
        return "zip"
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") < 1 << 30:
        return "safetensors"
    if head.startswith(b"\x80"):
        return "pickle"
    raise InputError(f"{path}: neither a torch nor a safetensors file; it starts with {head[:8]!r}")


def find_state(payload: Any, path: Path, *, ema: bool) -> dict[str, Tensor]:
    """The state dict in a file's content: the content itself, or the section asked for.

    With `ema` the averaged weights, or the raw ones where a file has no others, as released ones.
    """
    if not isinstance(payload, Mapping):
        raise InputError(f"{path}: holds a {type(payload).__name__}, expected tensors by name")
    sections = _sections(payload, ema=ema)
    if sections and not ema and sections[0] in _EMA:
        raise InputError(f"{path}: has no raw weights, only {', '.join(sections)}; ask for these (--ema, ema=True)")
    state = payload[sections[0]] if sections else payload
    if odd := [f"{key} ({type(value).__name__})" for key, value in state.items() if not isinstance(value, Tensor)]:
        raise InputError(
            f"{path}: expected tensors by name, or one of {', '.join((*_EMA, *_RAW))} with them; found "
            + ", ".join(odd[:6])
        )
    if not state:
        raise InputError(f"{path}: has no tensor in it")
    return {name: tensor.detach() for name, tensor in state.items()}


def _sections(payload: Mapping[str, Any], *, ema: bool) -> list[str]:
    """Keys with a state dict under them, those asked for first."""
    order = (*_EMA, *_RAW) if ema else (*_RAW, *_EMA)
    return [key for key in order if isinstance(payload.get(key), Mapping) and payload[key]]


def strip_wrappers(state: Mapping[str, Tensor], path: Path) -> dict[str, Tensor]:
    """Names as the network's own.

    That is without `module.`, `_orig_mod.`, `base_model.` and the like, wherever they stand, and without what stands
    before the first layer's name, as `model.diffusion_model.` or `transformer.`.
    """
    inner = {name: ".".join(part for part in name.split(".") if part not in _WRAPPERS) for name in state}
    prefixes = [name.removesuffix(first) for name in inner.values() for first in _FIRST if name.endswith(f".{first}")]
    stripped, origin = {}, {}
    for name, tensor in state.items():
        short = inner[name]
        for prefix in prefixes:
            short = short.removeprefix(prefix)
        if short in origin:
            raise InputError(f"{path}: {origin[short]} and {name} are both {short} without their prefixes; keep one")
        stripped[short], origin[short] = tensor, name
    return stripped


def read_index(index: Path) -> tuple[Path, ...]:
    """The shards that an index names, every one there and holding what the index says.

    Raises:
        InputError: the index is damaged, or a shard is missing or another.
    """
    try:
        where = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        files = sorted(set(where.values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{index}: the index of the shards cannot be read ({_one_line(error)})") from None
    outside = [str(file) for file in files if not isinstance(file, str) or Path(file).name != file]
    if not files or outside:
        raise InputError(f"{index}: expected names of files beside it, got {', '.join(outside) or 'none'}")
    if missing := [file for file in files if not (index.parent / file).is_file()]:
        raise InputError(f"{index}: shard {', '.join(missing)} is missing ({len(files)} shards named); fetch it")
    for file in files:
        held = find_state(read_payload(index.parent / file), index.parent / file, ema=True)
        if absent := [name for name, shard in where.items() if shard == file and name not in held]:
            raise InputError(f"{index}: names {absent[0]} in shard {file}, which does not hold it")
    return tuple(index.parent / file for file in files)


def _one_line(error: BaseException | str) -> str:
    return " ".join(str(error).split())[:160]
