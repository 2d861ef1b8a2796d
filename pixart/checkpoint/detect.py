"""Detects the PixArt variant of a file from tensor names, shapes and the stored position table, not from file names."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal

import torch
from torch import Tensor

from pixart.checkpoint.foreign import cause
from pixart.checkpoint.keys import NULL_CAPTION, diffusers_parts
from pixart.config import build, to_dict
from pixart.errors import InputError, did_you_mean
from pixart.model.embed import grid_positions
from pixart.model.pixart import PRESETS, PixArtConfig

Format = Literal["official", "diffusers"]
SIGMA_LENGTH = 300  # tokens of PixArt-Σ's captions; α has 120
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
POSITIONS = {"official": "pos_embed", "diffusers": "pos_embed.pos_embed"}  # checked if stored, never loaded
# the only tensors that a file may lack; the only additional one it may have is its position table
MAY_LACK: dict[Format, tuple[str, ...]] = {"official": (NULL_CAPTION,), "diffusers": (NULL_CAPTION,)}

_HEADS = {preset.hidden_size: preset.num_heads for preset in PRESETS.values()}
_SCALES = {preset.latent_size: preset.position_scale for preset in PRESETS.values() if preset != PRESETS["sigma-256"]}
_MAY_HAVE = ("attn.sr", "attn.norm", "attn.q_norm", "attn.k_norm")  # optional modules of an official block


@dataclass(frozen=True)
class Evidence:
    """What the tensors alone determine: the format, fields of `PixArtConfig`, and whether there is a null caption."""

    format: Format
    fields: dict[str, Any]
    has_null: bool


def recognise(state: Mapping[str, Any], source: str) -> Format:
    """The format, from tensor names alone.

    Raises:
        InputError: not a PixArt; the message says what it probably is.
    """
    kind: Format | None = None
    if any(name.startswith("blocks.0.cross_attn.") for name in state):
        kind = "official"
    elif all(any(name.startswith(sign) for name in state) for sign in ("transformer_blocks.0.", "adaln_single.")):
        kind = "diffusers"
    if (why := cause(state)) or kind is None:
        some = ", ".join(list(state)[:3])
        raise InputError(f"{source}: {why or 'not a PixArt'}; its tensors are {some} and {max(len(state) - 3, 0)} more")
    return kind


def check_floats(state: Mapping[str, Tensor], source: str) -> None:
    """Refuse quantised weights, whose values are meaningless without their scales."""
    for name, tensor in state.items():
        if tensor.dtype not in FLOATS:
            raise InputError(
                f"{source}: {name} holds {short(tensor.dtype)}, expected {', '.join(map(short, FLOATS))}; "
                "quantised weights are not supported, load the model that they were made of"
            )


def short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def examine(state: Mapping[str, Tensor], source: str) -> Evidence:
    """Determine format and network from a file's tensors; only the position table's values are read.

    Raises:
        InputError: not a PixArt, quantised, or incomplete; says what the file probably is and which tensors are wrong.
    """
    kind = recognise(state, source)
    check_floats(state, source)
    rename = {} if kind == "official" else {o: t[0] for o, t in diffusers_parts(1, micro_conditions=True).items()}

    def shape(name: str, ndim: int) -> tuple[int, ...]:
        theirs = rename.get(name, name)
        if theirs not in state:
            if others := ", ".join(_unknown(state, kind)[:2]):
                raise InputError(f"{source}: not a PixArt: it has no {theirs}, and {others}, which no PixArt has")
            raise InputError(f"{source}: {theirs} is missing; the file is not whole")
        if state[theirs].ndim != ndim or not state[theirs].numel():
            raise InputError(
                f"{source}: {theirs} has shape {tuple(state[theirs].shape)}, expected {ndim} dimensions"
                f"{'' if state[theirs].numel() else ', none of them empty'}"
            )
        return tuple(state[theirs].shape)

    width, channels, patch, _ = shape("x_embedder.proj.weight", 4)
    out = shape("final_layer.linear.weight", 2)[0]
    if out not in (channels * patch**2, 2 * channels * patch**2):
        raise InputError(
            f"{source}: the final layer has {out} rows, expected {channels * patch**2}, or twice that with variance, "
            f"by the {channels} channels and patch {patch} of the first"
        )
    block = "blocks" if kind == "official" else "transformer_blocks"
    found = {
        "hidden_size": width,
        "depth": _count_blocks(state, block, source),
        "mlp_ratio": shape("blocks.0.mlp.fc1.weight", 2)[0] / width,
        "patch_size": patch,
        "in_channels": channels,
        "learn_sigma": out == 2 * channels * patch**2,
        "caption_channels": shape("y_embedder.y_proj.fc1.weight", 2)[1],
        "micro_conditions": rename.get("csize_embedder.mlp.0.weight", "csize_embedder.mlp.0.weight") in state,
        **_compression(state, source),
    }
    if NULL_CAPTION in state:
        found["caption_length"] = shape(NULL_CAPTION, 2)[0]
    found |= read_positions(state, kind, width, patch, source)
    return Evidence(kind, found, NULL_CAPTION in state)


def read_positions(state: Mapping[str, Tensor], kind: Format, width: int, patch: int, source: str) -> dict[str, Any]:
    """Native size and position scale from a stored position table; empty if none is stored."""
    if POSITIONS[kind] not in state:
        return {}
    side, scale = solve_positions(state[POSITIONS[kind]], width, source)
    return {"position_scale": scale, "latent_size": side * patch}


def _count_blocks(state: Mapping[str, Any], block: str, source: str) -> int:
    """The number of blocks: the count of distinct block numbers, so that it cannot exceed the number of tensors."""
    found = {match[1] for name in state if (match := re.match(rf"{block}\.(\d+)\.", name))}
    if missing := sorted({str(i) for i in range(len(found))} - found, key=len):
        odd = max(found, key=len)[:20]
        raise InputError(f"{source}: {block}.{missing[0]} is missing beside {block}.{odd}; the file is not whole")
    return len(found)


def _unknown(state: Mapping[str, Any], kind: Format) -> list[str]:
    """Tensor names that no PixArt of this format has."""
    parts = diffusers_parts(1, micro_conditions=True)
    known = {POSITIONS[kind], NULL_CAPTION, *(part for parts in parts.values() for part in parts)}
    if kind == "official":
        optional = {f"blocks.0.{module}.{end}" for module in _MAY_HAVE for end in ("weight", "bias")}
        known = {POSITIONS[kind], NULL_CAPTION, *parts, *optional}
    return [name for name in state if re.sub(r"blocks\.\d+\.", "blocks.0.", name, count=1) not in known]


def _compression(state: Mapping[str, Tensor], source: str) -> dict[str, Any]:
    """KV compression and qk-norm, from their weights; only compression by "conv" has any, the other kinds cannot be
    detected."""
    normed, biased = (any(name.endswith(f"attn.q_norm.{kind}") for name in state) for kind in ("weight", "bias"))
    found: dict[str, Any] = {"qk_norm": "rms_norm" if normed and not biased else normed}
    kernels = {
        int(match[1]): tuple(tensor.shape)
        for name, tensor in state.items()
        if (match := re.fullmatch(r"blocks\.(\d{1,9})\.attn\.sr\.weight", name)) and tensor.ndim
    }
    if kernels:
        ratios = {kernel[-1] for kernel in kernels.values()}
        if len(ratios) > 1:
            raise InputError(f"{source}: blocks compress keys by different ratios {sorted(ratios)}; one is supported")
        found |= {"kv_compression": "conv", "kv_blocks": tuple(sorted(kernels)), "kv_ratio": ratios.pop()}
    return found


def solve_positions(table: Tensor, width: int, source: str) -> tuple[int, float]:
    """Native tokens per side and position scale of a stored table (1, N, width).

    The token in row 0, column 1 holds the sine and cosine of 1 / scale at frequency 1. The table computed with that
    scale must equal the stored one.

    Raises:
        InputError: the table is not PixArt's for any scale.
    """
    side = math.isqrt(table.shape[-2]) if table.ndim == 3 else 0
    if table.ndim != 3 or tuple(table.shape) != (1, side**2, width) or side < 2 or width % 4:
        raise InputError(
            f"{source}: pos_embed has shape {tuple(table.shape)}, expected (1, N, {width}) with N a square number"
        )
    table = table[0].float()
    rounded = any(torch.equal(table, table.to(dtype).float()) for dtype in (torch.float16, torch.bfloat16))
    angle = math.atan2(table[1, 0], table[1, width // 4])
    guess, best = 1 / angle if angle > 0 else math.nan, math.nan
    if math.isfinite(guess):
        # released scales are powers of two; a half-precision table determines its scale to three digits only
        scales = (2.0 ** round(math.log2(guess)), *(float(f"{guess:.{digits}g}") for digits in (2, 3, 4, 6)), guess)
        errors = []
        for scale in scales:
            computed = grid_positions(side, side, width, base=side, scale=scale)
            errors.append((computed - table).abs().max().item())
            if errors[-1] <= (1e-2 if rounded else 1e-5):
                return side, scale
        best = min(errors)
    raise InputError(
        f"{source}: pos_embed is not PixArt's table of {side} × {side} positions at any scale (nearest scale "
        f"{guess:.4g}, off by {best:.3g}); another model's, or damaged"
    )


def complete(found: Evidence, told: dict[str, Any], overrides: dict[str, Any] | None, source: str) -> PixArtConfig:
    """The network's config: fields from the tensors, then the caller's overrides, then `told` from files beside them.

    Raises:
        InputError: an override contradicts the tensors, or a field is known from none of them; says what to pass.
    """
    overrides = overrides or {}
    check_fields(overrides)
    for name, value in overrides.items():
        if name in found.fields and to_dict(found.fields[name]) != to_dict(value):
            raise contradiction(source, "overrides say", name, value, found.fields)
    known = {**told, **overrides, **found.fields}
    if "caption_length" not in known:
        if not known["micro_conditions"]:
            raise _ask(source, "caption_length", "no null caption: 120 for PixArt-α, 300 for PixArt-Σ", 120)
        known["caption_length"] = PRESETS["alpha-1024"].caption_length  # Σ has no micro-conditions
    if "latent_size" not in known:
        if not known["micro_conditions"]:
            sizes = "32 for 256 px, 64 for 512 px, 128 for 1024 px, 256 for 2K"
            raise _ask(source, "latent_size", f"no position table, which tells the native size: {sizes}", 64)
        known["latent_size"] = PRESETS["alpha-1024"].latent_size
    if "num_heads" not in known:
        if known["hidden_size"] not in _HEADS:
            raise _ask(source, "num_heads", f"width {known['hidden_size']} is no preset's", 12)
        known["num_heads"] = _HEADS[known["hidden_size"]]
    if "position_scale" not in known:
        known["position_scale"] = _position_scale(known, source)
    return build(PixArtConfig, {f.name: known[f.name] for f in fields(PixArtConfig) if f.name in known})


def check_fields(overrides: dict[str, Any]) -> None:
    """Refuse names that `PixArtConfig` does not have."""
    names = [f.name for f in fields(PixArtConfig)]
    for name in overrides:
        if name not in names:
            hint = did_you_mean(name, names, cutoff=0.4)
            raise InputError(f"overrides: unknown field '{name}'{hint} (there are {', '.join(names)})")


def contradiction(source: str, who: str, name: str, value: Any, found: Mapping[str, Any]) -> InputError:
    """The error for a stated value that the file's tensors contradict."""
    own = "position table" if name in ("latent_size", "position_scale") else "tensors"
    return InputError(f"{source}: {who} {name} {value}; by the file's own {own} it is {found[name]}")


def is_sigma(config: PixArtConfig) -> bool:
    """Whether a network is a PixArt-Σ: by its caption length, key compression, or a size that no α has."""
    return not config.micro_conditions and (
        config.caption_length == SIGMA_LENGTH or config.kv_compression is not None or config.latent_size >= 128
    )


def _position_scale(known: dict[str, Any], source: str) -> float:
    """The position scale of the released models of this native size."""
    size, length = known["latent_size"], known["caption_length"]
    if size not in _SCALES:
        raise _ask(source, "position_scale", f"no position table, and no released model has latent_size {size}", 1.0)
    sigma_256 = PRESETS["sigma-256"]
    return sigma_256.position_scale if (size, length) == (sigma_256.latent_size, SIGMA_LENGTH) else _SCALES[size]


def _ask(source: str, name: str, why: str, example: Any) -> InputError:
    return InputError(
        f"{source}: the file cannot tell {name} ({why}); pass it, as overrides={{'{name}': {example}}} "
        f"or --set {name}={example}"
    )
