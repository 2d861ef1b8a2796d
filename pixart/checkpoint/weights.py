"""Reads tensors from files, memory-mapped; the format is detected from the content, and no code in a file is ever run.

Every `Weights.read` maps the files anew. Pages from which tensors were copied are released with their map, so that
loading never holds a weight twice.
"""

import argparse
import pickle
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from pixart.encoders.tensor_files import check_tensors, load_torch, sniff
from pixart.errors import InputError
from pixart.files import read_json

CARD_KEY = "pixart_card"  # JSON beside an official file's state_dict, for models that would otherwise be misread
# sections of training checkpoints with averaged and with raw weights: PixArt's authors', DiT's, DeepSpeed's
_EMA, _RAW = ("state_dict_ema", "ema"), ("state_dict", "model", "module", "model_state_dict")
# name components added by wrappers: DDP, torch.compile, ControlNet, FSDP, trainers
_WRAPPERS = {"module", "_orig_mod", "base_model", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "model"}
# every PixArt has one of these; anything before it is a prefix
_FIRST = ("x_embedder.proj.weight", "pos_embed.proj.weight")

# ends of the names of weights, and of what quantised weights have beside them
_WEIGHT = re.compile(r"(weight|bias|table|embed|embedding)$|scale|zero|quant|absmax")


@dataclass(frozen=True)
class Weights:
    """The tensors of one model in one or more files; nothing is opened before `read`, which maps them into memory."""

    files: tuple[Path, ...]
    ema: bool = True  # prefer the averaged weights of a training checkpoint

    def read(self) -> dict[str, Tensor]:
        """Names without wrappers' prefixes → tensors in a new private memory map; writing to them changes no file.

        Raises:
            InputError: not files of weights, damaged, containing code, or with a name that occurs twice.
        """
        state: dict[str, Tensor] = {}
        for file in self.files:
            part = find_state(read_payload(file), file, ema=self.ema)
            if twice := sorted(state.keys() & part.keys()):
                raise InputError(f"{file}: {twice[0]} stands in another file of this model too")
            state.update(part)
        state = {name: tensor for name, tensor in state.items() if not _is_counter(name, tensor)}
        return strip_wrappers(state, self.files[0] if len(self.files) == 1 else self.files[0].parent)

    def may_stay_mapped(self) -> bool:
        """Whether a model may keep using the mapped tensors: torch.save truncates a file in place, and then access to
        its map kills the process."""
        return all(sniff(file) != "zip" for file in self.files)

    def sections(self) -> list[str]:
        """The sections of a training checkpoint that hold weights, the one that `read` uses first; empty for a plain
        file of tensors."""
        return _sections(read_payload(self.files[0]), ema=self.ema)

    def card_text(self) -> str | None:
        """The card that our export to the official format adds if needed."""
        if len(self.files) != 1:
            return None
        if sniff(self.files[0]) == "safetensors":
            with safe_open(self.files[0], "pt") as file:
                return (file.metadata() or {}).get(CARD_KEY)
        payload = read_payload(self.files[0])
        return payload.get(CARD_KEY) if isinstance(payload, Mapping) else None


def read_payload(path: Path) -> Any:
    """A file's content with memory-mapped tensors (torch files from before version 1.6 cannot be mapped).

    Raises:
        InputError: unreadable, damaged, or containing code.
    """
    kind = sniff(path)
    try:
        if kind == "safetensors":
            return load_file(path)
        with torch.serialization.safe_globals([argparse.Namespace]):  # a script's arguments, which are data alone
            return load_torch(path, kind)
    except pickle.UnpicklingError as error:
        if found := re.search(r"GLOBAL ([\w.]+)", str(error)):
            raise InputError(
                f"{path}: refused, since loading it would run code: its pickle calls {found[1]}. {_way_out(path)}"
            ) from None
        reason = str(error).partition("WeightsUnpickler error:")[2] or str(error)
        reason = _one_line(reason.partition("Check the documentation")[0])  # advice on disabling the protection
        raise InputError(
            f"{path}: refused: damaged, or a pickle that torch.save did not write, which might run code ({reason}); "
            "fetch it again, or have its author save the tensors by torch.save or safetensors"
        ) from None
    except InputError:
        raise
    except Exception as error:  # the readers raise any kind on damaged files
        raise InputError(
            f"{path}: truncated or damaged ({path.stat().st_size:,} bytes; {_one_line(error)}); fetch it again"
        ) from None


def _way_out(path: Path) -> str:
    """A command that extracts the tensors from a pickle with code, including pickled networks, section by section."""
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


def _is_counter(name: str, tensor: Tensor) -> bool:
    """Whether a tensor is no weight but a buffer that trainers keep beside them: a single number, as the steps of an
    average, or a list of integers, as the positions of tokens. A PixArt has neither."""
    if tensor.ndim == 0:
        return True
    integers = not tensor.is_floating_point() and not tensor.is_complex()
    return integers and tensor.ndim == 1 and _WEIGHT.search(name) is None


def find_state(payload: Any, path: Path, *, ema: bool) -> dict[str, Tensor]:
    """The state dict in a file's content: the content itself, or one of its sections.

    With `ema` these are the averaged weights, or the raw ones if there are no others, as in released files.
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
    check_tensors(state, path)
    return {name: tensor.detach() for name, tensor in state.items()}


def _sections(payload: Mapping[str, Any], *, ema: bool) -> list[str]:
    """Keys that hold a state dict, in order of preference."""
    order = (*_EMA, *_RAW) if ema else (*_RAW, *_EMA)
    return [key for key in order if isinstance(payload.get(key), Mapping) and payload[key]]


def strip_wrappers(state: Mapping[str, Tensor], path: Path) -> dict[str, Tensor]:
    """Tensors under the network's own names.

    Removes `module.`, `_orig_mod.`, `base_model.` and similar components anywhere in a name, and everything before the
    first layer's name, such as `model.diffusion_model.` or `transformer.`.

    Raises:
        InputError: several networks in one file, or two tensors with the same name without prefixes.
    """
    inner = {name: ".".join(part for part in name.split(".") if part not in _WRAPPERS) for name in state}
    prefixes = [name.removesuffix(first) for name in inner.values() for first in _FIRST if name.endswith(f".{first}")]
    if len(prefixes := sorted(set(prefixes))) > len(_FIRST) * 4:
        raise InputError(f"{path}: holds {len(prefixes)} networks, {prefixes[0]} and others; expected one")
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
    """The shards that an index lists; each must exist and contain the tensors listed for it.

    Raises:
        InputError: the index is damaged, or a shard is missing or does not contain its tensors.
    """
    where = read_json(index, what="the index of the shards").get("weight_map")
    if not isinstance(where, dict) or not all(isinstance(file, str) for file in where.values()):
        raise InputError(f"{index}: the index of the shards cannot be read (expected weight_map: tensor → file)")
    files = sorted(set(where.values()))
    outside = [file for file in files if Path(file).name != file]
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
