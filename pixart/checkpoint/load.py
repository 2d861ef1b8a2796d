"""Loads any published PixArt format into our network, with its card: `load_model(source)`. Loading is always strict.

    locate (which files) → examine (which format and network) → plan (tensor by tensor) → read

The network is built on the meta device, and its parameters are the memory-mapped tensors of a safetensors file. Tensors
that must be copied (from torch's own files, which torch.save may truncate in place; split matrices of diffusers; other
dtypes or devices) are copied in groups, and each group's memory map is released afterwards.
"""

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pixart.checkpoint.cards import implied_card, settings_fields, with_own_parts
from pixart.checkpoint.detect import (
    FLOATS,
    MAY_LACK,
    POSITIONS,
    check_fields,
    check_floats,
    complete,
    contradiction,
    examine,
    is_sigma,
    read_positions,
    short,
)
from pixart.checkpoint.files import ModelCard, compare_shapes
from pixart.checkpoint.keys import NULL_CAPTION, diffusers_parts
from pixart.checkpoint.locate import Found, locate
from pixart.config import build, build_written, names_with, to_dict
from pixart.device import check_device
from pixart.errors import InputError
from pixart.extensions import load_extensions
from pixart.files import parse_json
from pixart.model.pixart import PixArt, PixArtConfig

GROUP_BYTES = 256 << 20  # bytes copied before the file is mapped anew


@dataclass(frozen=True)
class Plan:
    """How to read a model from its files; `parts`: our name of each tensor → the file's names of its parts by rows."""

    format: str  # ours, official or diffusers
    card: ModelCard
    model: PixArt  # on the meta device
    parts: dict[str, tuple[str, ...]]
    has_null: bool  # whether the file has a null caption; all zeros count as none


def load_model(
    source: str | Path,
    *,
    ema: bool = True,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    overrides: dict[str, Any] | None = None,
    revision: str | None = None,
    extensions: Iterable[str | Path] = (),
) -> PixArt:
    """Load a PixArt in eval mode from any format; its config is determined from its files.

    No parameter requires a gradient: call `requires_grad_(True)` to train. On the CPU, weights in safetensors files
    stay memory-mapped: while the model is in use, such a file may be replaced but must not be modified in place.

    Args:
        source: an official .pth or training checkpoint; a diffusers transformer or pipeline folder, or one of its
            files; a model or run in our format; or on the Hub owner/name, owner/name/subfolder or owner/name/file.pth.
        ema: whether to load the averaged weights if the source has averaged and raw ones.
        dtype: by default that of the files, which must then all agree.
        device: the CPU by default.
        overrides: fields of `PixArtConfig` that the file does not determine, e.g. {"num_heads": 12}.
        revision: of a Hub repository: a branch, tag or commit.
        extensions: Python files that register the variants that the model uses, see `pixart.extensions`.

    Raises:
        InputError: nothing there, not a PixArt, or incomplete; names files, tensors, shapes and the likely cause.
    """
    return load_with_card(
        source, ema=ema, dtype=dtype, device=device, overrides=overrides, revision=revision, extensions=extensions
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
) -> tuple[PixArt, ModelCard]:
    """As `load_model`, together with the card that sampling needs: the source's own, or the one its variant implies."""
    load_extensions(extensions)
    if dtype not in (None, *FLOATS):
        raise InputError(f"dtype: got {short(dtype)}, expected one of {', '.join(map(short, FLOATS))}")
    if device is not None:
        check_device(device)
    found = locate(source, ema=ema, revision=revision)
    state = found.weights.read()
    plan = make_plan(found, state, overrides)
    if dtype is None:
        check_one_dtype(state, plan, found.name)
    loaded = dict(_take(found, state, plan, dtype, torch.device(device or "cpu")))
    plan.model.load_state_dict(loaded, strict=True, assign=True)
    plan.model.card = plan.card  # the default card of `export_model`
    # for marks of bases: rounding to fp16 shows in the fingerprint, and no longer in weights read as bf16
    plan.model.from_half = any(state[part].dtype == torch.float16 for parts in plan.parts.values() for part in parts)
    return plan.model.eval().requires_grad_(False), plan.card


def make_plan(found: Found, state: dict[str, Tensor], overrides: dict[str, Any] | None = None) -> Plan:
    """Determine the network that the tensors belong to, and compare every name and shape with it.

    Raises:
        InputError: as `load_model`.
    """
    card = network_card(found)
    plan = _by_tensors(found, state, overrides) if card is None else _by_card(found, card, state, overrides)
    expected, held = _expected(plan), _shapes(state)
    if difference := compare_shapes(expected, held):
        if card is not None:
            what = f"does not fit the model of its {'config' if found.kind == 'ours' else 'card'}"
        else:  # unknown names mean another network, which may be complete
            kind = "PixArt-Σ" if is_sigma(plan.card.model) else "PixArt"
            what = f"is not a {'' if held.keys() - expected else 'whole '}{kind} in the {plan.format} format"
        raise InputError(f"{found.name} {what}; {difference}")
    return plan


def network_card(found: Found) -> ModelCard | None:
    """The card that defines the network: that of our format, or the one inside an official file. None if the tensors
    determine the network, as always in diffusers' format, where a card may only stand beside them."""
    return found.card or card_inside(found) if found.settings is None else None


def _by_card(found: Found, card: ModelCard, state: dict[str, Tensor], overrides: dict[str, Any] | None) -> Plan:
    check_fields(overrides or {})
    check_floats(state, found.name)
    config = build(PixArtConfig, overrides or {}, where="overrides.", start=card.model)
    if found.kind == "ours":
        return _plan("ours", with_own_parts(replace(card, model=config), found), state)
    table = read_positions(state, "official", config.hidden_size, config.patch_size, found.name)
    for name, value in table.items():
        if getattr(config, name) != value:
            who = "overrides say" if name in (overrides or {}) else "its card says"
            raise contradiction(found.name, who, name, getattr(config, name), table)
    return _plan("official", replace(card, model=config), state)


def _by_tensors(found: Found, state: dict[str, Tensor], overrides: dict[str, Any] | None) -> Plan:
    evidence = examine(state, found.name)
    card = found.card
    if card is not None:
        for name, value in evidence.fields.items():
            if to_dict(getattr(card.model, name)) != to_dict(value):
                raise contradiction(found.name, "its card says", name, getattr(card.model, name), evidence.fields)
    told = settings_fields(found, evidence, overrides or {})
    if card is not None:
        both = names_with(PixArtConfig, "diffusers", "told")  # in config.json and in the card
        if other := [name for name in told if name in both and told[name] != getattr(card.model, name)]:
            raise InputError(
                f"{found.name}: its config.json says {other[0]} {told[other[0]]}, its card "
                f"{getattr(card.model, other[0])}; one of the two was changed"
            )
        told = {field.name: getattr(card.model, field.name) for field in fields(PixArtConfig)}
    config = complete(evidence, told, overrides, found.name)
    card = with_own_parts(replace(card, model=config), found) if card else implied_card(config, evidence, found)
    return _plan(evidence.format, card, state)


def check_one_dtype(state: dict[str, Tensor], plan: Plan, source: str) -> None:
    """Refuse a file whose tensors differ in dtype, because which one is intended is unknown."""
    used = {part: state[part].dtype for parts in plan.parts.values() for part in parts}
    counts = Counter(used.values()).most_common()
    if len(counts) > 1:
        rarest = counts[-1][0]
        names = [name for name, dtype in used.items() if dtype == rarest]
        listed = ", ".join(f"{count} {short(dtype)}" for dtype, count in counts)
        raise InputError(
            f"{source}: its tensors are of several dtypes ({listed}; {short(rarest)} as {names[0]}); "
            "choose one with dtype=torch.float32 or --dtype float32"
        )


def non_finite(tensor: Tensor) -> bool:
    """Whether a tensor has a NaN or infinity; the sum is tested first, since it needs no temporary tensor."""
    return not bool(torch.isfinite(tensor.sum())) and not bool(torch.isfinite(tensor).all())


def _plan(kind: str, card: ModelCard, state: dict[str, Tensor]) -> Plan:
    with torch.device("meta"):
        model = PixArt(card.model)
    names = model.state_dict().keys()
    if kind == "diffusers":
        c = card.model
        table = diffusers_parts(c.depth, micro_conditions=c.micro_conditions)
        parts = {name: table.get(name, (name,)) for name in names}
    else:
        parts = {name: (name,) for name in names}
    has_null = NULL_CAPTION in state
    if not has_null and NULL_CAPTION in MAY_LACK.get(kind, ()):
        del parts[NULL_CAPTION]
    elif kind == "ours":  # our format stores an absent null caption as zeros
        has_null = has_null and bool(state[NULL_CAPTION].any())
    return Plan(kind, card, model, parts, has_null)


def _expected(plan: Plan) -> dict[str, tuple[int, ...]]:
    """The names and shapes that a file of the planned network has."""
    tensors = plan.model.state_dict()
    expected = {}
    for name, parts in plan.parts.items():
        rows, *rest = tensors[name].shape
        expected |= {part: (rows // len(parts), *rest) for part in parts}
    return expected


def _shapes(state: dict[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in state.items() if name not in POSITIONS.values()}


def card_inside(found: Found) -> ModelCard | None:
    """The card that our export to the authors' format stores in the file if its tensors alone would be misread."""
    text = found.weights.card_text()
    if text is None:
        return None
    try:
        return build_written(ModelCard, parse_json(text), place=f"{found.name}: ")
    except (TypeError, ValueError) as error:
        raise InputError(f"{found.name}: its card cannot be read ({error})") from None


def _take(
    found: Found, state: dict[str, Tensor], plan: Plan, dtype: torch.dtype | None, device: torch.device
) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of the network: the memory-mapped one if it can be used as it is, else a copy."""
    copied: list[list[str]] = [[]]
    may_stay = found.weights.may_stay_mapped() and device.type == "cpu"
    size = 0
    for name, parts in plan.parts.items():
        tensor = state[parts[0]]
        if may_stay and len(parts) == 1 and dtype in (None, tensor.dtype):
            _check_finite(parts[0], tensor, found.name)
            yield name, tensor
            continue
        if size > GROUP_BYTES:
            copied.append([])
            size = 0
        copied[-1].append(name)
        size += sum(state[part].nbytes for part in parts)
    for group in filter(None, copied):
        fresh = found.weights.read()
        for name in group:
            yield name, _copy(fresh, plan.parts[name], found.name, dtype, device)
        del fresh
    if NULL_CAPTION not in plan.parts:
        config, like = plan.card.model, state[next(iter(plan.parts.values()))[0]]
        shape = config.caption_length, config.caption_channels
        yield NULL_CAPTION, torch.zeros(shape, dtype=dtype or like.dtype, device=device)


def _copy(state: dict[str, Tensor], parts: tuple[str, ...], source: str, dtype, device) -> Tensor:
    for part in parts:
        _check_finite(part, state[part], source)
    tensor = torch.cat([state[part] for part in parts]) if len(parts) > 1 else state[parts[0]]
    result = tensor.to(device=device, dtype=dtype or tensor.dtype, copy=len(parts) == 1)
    if result.dtype != tensor.dtype and non_finite(result):
        raise InputError(f"{source}: {parts[0]} overflows in {short(result.dtype)}; use bfloat16 or float32")
    return result


def _check_finite(name: str, tensor: Tensor, source: str) -> None:
    if non_finite(tensor):
        raise InputError(f"{source}: {name} has NaN or infinite weights; the training that wrote it had diverged")
