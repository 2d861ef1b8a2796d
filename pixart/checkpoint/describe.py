"""A description of a model file: variant, size, dtypes, null caption, positions, and what would be refused."""

from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import Tensor

from pixart.checkpoint.detect import FLOATS, examine, is_sigma, recognise, short
from pixart.checkpoint.files import WEIGHTS, ModelCard
from pixart.checkpoint.load import Plan, check_one_dtype, make_plan, network_card, non_finite
from pixart.checkpoint.locate import Found, locate
from pixart.checkpoint.save import FORMATS, refusal
from pixart.config import names_with
from pixart.errors import InputError
from pixart.extensions import load_extensions
from pixart.model.pixart import PRESETS, PixArtConfig


def describe(
    source: str | Path,
    *,
    ema: bool = True,
    overrides: dict[str, Any] | None = None,
    revision: str | None = None,
    extensions: Iterable[str | Path] = (),
) -> str:
    """Describe a model in lines of text; all weights are read once, to find NaNs.

    Raises:
        InputError: nothing there, or not a PixArt. Everything else that would be refused is a line of the text.
    """
    load_extensions(extensions)
    found = locate(source, ema=ema, revision=revision)
    state = found.weights.read()
    refused = []
    dtypes = Counter(short(tensor.dtype) for tensor in state.values())
    floats = {name: tensor for name, tensor in state.items() if tensor.dtype in FLOATS}
    broken = [name for name, tensor in floats.items() if non_finite(tensor)]
    nans = f"in {len(broken)} tensors: {', '.join(broken[:4])}" if broken else "none"
    if quantised := len(state) - len(floats):
        nans += f"; {quantised} quantised tensors were not looked at"
    if broken:
        refused.append(f"load: NaN or infinite weights in {', '.join(broken[:4])}")
    lines = [
        ("files", ", ".join(file.name for file in found.weights.files)),
        *_chosen(found),
        ("dtype", ", ".join(f"{dtype} ({count} tensors)" for dtype, count in dtypes.most_common())),
        ("NaNs", nans),
    ]
    try:
        plan = make_plan(found, state, overrides)
    except InputError as error:
        refused.append(f"load: {error}")
        if network_card(found) is None:
            lines = [("format", recognise(state, found.name)), *lines]  # raises if it is not a PixArt
            lines += [] if quantised else _evidence(state, found.name)
    else:
        lines = [("format", plan.format), ("variant", _variant(plan.card)), *lines, *_facts(plan)]
        try:
            check_one_dtype(state, plan, found.name)
        except InputError as error:
            refused.append(f"load without a dtype: {error}")
        reasons = {format: refusal(plan.card, format, has_null=plan.has_null) for format in FORMATS}
        refused += [f"convert to {format}: {why}" for format, why in reasons.items() if why]
    lines += [("refused", why) for why in refused] or [("refused", "nothing")]
    return "\n".join(f"{name:<18}{text}" for name, text in lines)


def _chosen(found: Found) -> list[tuple[str, str]]:
    """Which weights were chosen if a source has several: averaged or raw ones of a training checkpoint."""
    if found.kind == "ours":
        folder = found.weights.files[0].absolute().parent
        if folder.name not in ("ema", "model") or not folder.parent.name.startswith("step_"):
            return []
        kinds = ("ema", "model") if folder.name == "ema" else ("model", "ema")
        there = [f"{folder.parent.name}/{kind}" for kind in kinds if (folder.parent / kind / WEIGHTS).is_file()]
    else:
        there = found.weights.sections()
    also = f" (also there: {', '.join(there[1:])})" if there[1:] else ""
    return [("weights", there[0] + also)] if there else []


def _evidence(state: dict[str, Tensor], source: str) -> list[tuple[str, str]]:
    """The settings that the tensors alone determine."""
    evidence = examine(state, source)
    told = ", ".join(f"{name} {value}" for name, value in evidence.fields.items())
    return [("tensors say", told), ("null caption", "present" if evidence.has_null else "absent")]


def _variant(card: ModelCard) -> str:
    names = [name for name, config in PRESETS.items() if config == card.model and "-" in name]
    family = "PixArt-Σ" if is_sigma(card.model) else "PixArt-α"
    return f"{family} ({names[0]})" if names else f"{family}, of no released size"


def _facts(plan: Plan) -> list[tuple[str, str]]:
    card, c = plan.card, plan.card.model
    count = sum(parameter.numel() for parameter in plan.model.parameters())
    pixels = c.latent_size * card.vae.downsample
    blocks = ", ".join(map(str, c.kv_blocks))
    others = _other_settings(c)
    return [
        ("resolution", f"{pixels} px (latents {c.latent_size} × {c.latent_size})"),
        ("parameters", f"{count:,}"),
        ("network", f"{c.depth} blocks of width {c.hidden_size}, {c.num_heads} heads, patch {c.patch_size}"),
        ("positions", f"scale {c.position_scale:g}"),
        ("micro-conditions", "yes" if c.micro_conditions else "no"),
        ("key compression", f"{c.kv_compression}, ratio {c.kv_ratio}, blocks {blocks}" if blocks else "none"),
        ("qk-norm", {False: "no", True: "yes"}.get(c.qk_norm, c.qk_norm)),
        *([("other settings", others)] if others else []),
        ("captions", f"{c.caption_length} tokens of {card.text.model}, {c.caption_channels} wide"),
        ("null caption", f"{'present' if plan.has_null else 'absent'}; sampling takes {card.text.null}"),
        ("VAE", f"{card.vae.kind} {card.vae.source}".strip()),
        ("diffusion", f"{card.diffusion.schedule}, {card.diffusion.prediction}"),
    ]


def _other_settings(config: PixArtConfig) -> str:
    plain = type(config)()
    values = {name: getattr(config, name) for name in names_with(type(config), "described", False)}
    return ", ".join(f"{name} {value}" for name, value in values.items() if value != getattr(plain, name))
