"""The tensors of an adapter's file → changes of our weights: which belong together, how strong, and that they fit."""

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from pixart.adapters.changes import Change, Difference, Hadamard, Kronecker, LowRank
from pixart.adapters.lora import scale_of
from pixart.adapters.lora_names import Place, find_place, split_name, whose
from pixart.errors import InputError


def interpret(state: Mapping[str, Tensor], settings: Mapping[str, Any], path: Path) -> dict[Place, Change]:
    """Tensors → changes, every one of them used.

    Raises:
        InputError: names that fit nothing, or matrices without their other half.
    """
    grouped: dict[str, dict[str, Tensor]] = {}
    strangers = []
    for name, tensor in state.items():
        found = split_name(name)
        if found is None:
            strangers.append(name)
        else:
            grouped.setdefault(found[0], {})[found[1]] = tensor
    if not grouped:
        if any(re.search(r"attn1?\.(qkv|to_q)\.weight$", name) for name in state):
            raise InputError(f"{path}: this is a model, not a LoRA; give it as the model (--model)")
        raise InputError(f"{path}: no tensor of a LoRA in it; it has {', '.join(strangers[:3])}")
    places = {module: find_place(module) for module in grouped}
    strangers += [module for module, place in places.items() if place is None]
    if strangers:
        other = whose(strangers)
        raise InputError(
            f"{path}: {f'this is an adapter {other}, not of a PixArt' if other else 'names that fit no PixArt'}: "
            f"{', '.join(strangers[:3])}{' …' if len(strangers) > 3 else ''} ({len(strangers)} of {len(state)} names)"
        )
    changes: dict[Place, Change] = {}
    for module, tensors in grouped.items():
        for place, change in _changes(module, places[module], tensors, settings, path):
            if place in changes:
                raise InputError(f"{path}: {module} and another name both change {place.module}; keep one")
            changes[place] = change
    return changes


def _changes(
    module: str, place: Place, tensors: dict[str, Tensor], settings: Mapping[str, Any], path: Path
) -> list[tuple[Place, Change]]:
    """The changes that one module's tensors make."""
    for kind, tensor in tensors.items():
        if (wrong := _wrong_tensor(kind, tensor)) is not None:
            raise InputError(f"{path}: {module}: {kind} {wrong}")
    kinds, alpha = set(tensors) - {"alpha"}, tensors.get("alpha")

    def scale(rank: int) -> float:
        return _scale(module, rank, None if alpha is None else float(alpha), settings, path)

    found: list[tuple[Place, Change]] = []
    try:
        if kinds <= {"down", "up", "magnitude"} and {"down", "up"} <= kinds:
            down, up, magnitude = tensors["down"], tensors["up"], tensors.get("magnitude")
            if magnitude is not None:
                by_columns = magnitude.ndim == 2 and magnitude.shape[0] == 1
                magnitude = magnitude.reshape(1, -1) if by_columns else magnitude.flatten()
            found = [(place, LowRank(down, up.flatten(1), scale(len(down)), magnitude))]
        elif {"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"} == kinds:
            first, second = ((tensors[f"hada_w{i}_a"], tensors[f"hada_w{i}_b"]) for i in (1, 2))
            found = [(place, Hadamard(first, second, scale(len(first[1]))))]
        elif any(kind.startswith("lokr_") for kind in kinds) and "lokr_t2" not in kinds:
            first, second = (
                tensors[f"lokr_w{i}"] if f"lokr_w{i}" in kinds else (tensors[f"lokr_w{i}_a"], tensors[f"lokr_w{i}_b"])
                for i in (1, 2)
            )
            ranks = [len(part[1]) for part in (first, second) if isinstance(part, tuple)]
            found = [(place, Kronecker(first, second, scale(ranks[-1]) if ranks else 1.0))]
        elif kinds and kinds <= {"diff", "diff_b"}:
            names = {"diff": "weight", "diff_b": "bias"}
            found = [(place._replace(tensor=names[kind]), Difference(tensors[kind])) for kind in sorted(kinds)]
    except KeyError as error:
        raise InputError(f"{path}: {module} has no {error.args[0]}, which its other tensors need") from None
    if not found:
        raise InputError(
            f"{path}: {module}: got {', '.join(sorted(tensors))}, expected down and up (LoRA), or all tensors of a "
            "LoHa, a LoKr or a difference"
        )
    for _, change in found:
        if (wrong := change.misfit()) is not None:
            raise InputError(f"{path}: {module}: {wrong}")
    return found


def _wrong_tensor(kind: str, tensor: Tensor) -> str | None:
    """What is wrong with one tensor by itself, None if nothing."""
    if kind == "alpha":
        right = tensor.numel() == 1 and not tensor.is_complex() and math.isfinite(float(tensor))
        return None if right else f"is {tensor.flatten()[:4].tolist()}, expected one finite number"
    if not tensor.is_floating_point():
        return f"is of type {str(tensor.dtype).removeprefix('torch.')}, expected floating point"
    most = 4 if kind not in ("magnitude", "diff", "diff_b") else math.inf
    if not tensor.numel() or not (tensor.ndim >= 2 or most > 4) or tensor.ndim > most:
        return f"has the shape {tuple(tensor.shape)}, expected a matrix of rank 1 or more"
    if not bool(tensor.float().isfinite().all()):
        return "has values that are not finite"
    return None


def _scale(module: str, rank: int, alpha: float | None, settings: Mapping[str, Any], path: Path) -> float:
    """α/r: α of the file, else of PEFT's settings, else r."""
    if alpha is not None:
        return alpha / rank
    if settings.get("lora_alpha") is None:
        return 1.0
    name = re.sub(r"^(unet\.)?(base_model\.model\.)?(transformer\.)?(?=\w)", "", module)
    patterns = settings.get("alpha_pattern") or {}
    if not isinstance(patterns, Mapping):
        raise InputError(f"{path}: its settings: alpha_pattern: got {patterns!r}, expected patterns with an alpha each")
    key, found = "lora_alpha", settings["lora_alpha"]
    for pattern, value in patterns.items():
        try:
            if re.match(rf"(.*\.)?({pattern})$", name):
                key, found = f"alpha_pattern: {pattern}", value
                break
        except re.error as error:
            raise InputError(
                f"{path}: its settings: alpha_pattern: {pattern!r} is no regular expression ({error})"
            ) from None
    if not isinstance(found, (int, float)) or isinstance(found, bool) or not 0 < found < 1e9:
        raise InputError(f"{path}: its settings: {key}: got {found!r}, expected a positive number")
    return scale_of(float(found), rank, bool(settings.get("use_rslora")))
