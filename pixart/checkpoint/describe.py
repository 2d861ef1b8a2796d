"""What a source holds, in words: variant, size, dtypes, null caption, positions, and what would be refused."""

from collections import Counter
from pathlib import Path
from typing import Any

from pixart.checkpoint.detect import examine, is_sigma
from pixart.checkpoint.files import ModelCard
from pixart.checkpoint.load import Plan, check_one_dtype, make_plan, non_finite
from pixart.checkpoint.locate import locate
from pixart.checkpoint.save import FORMATS, refusal
from pixart.errors import InputError
from pixart.model.pixart import PRESETS


def describe(
    source: str | Path, *, ema: bool = True, overrides: dict[str, Any] | None = None, revision: str | None = None
) -> str:
    """Lines of text about a model; all weights are read once, for NaNs.

    Raises:
        InputError: nothing there, or no PixArt at all. What else would be refused is a line of the text.
    """
    found = locate(source, ema=ema, revision=revision)
    state = found.weights.read()
    refused = []
    dtypes = Counter(str(tensor.dtype).removeprefix("torch.") for tensor in state.values())
    broken = [name for name, tensor in state.items() if tensor.is_floating_point() and non_finite(tensor)]
    if broken:
        refused.append(f"load: NaN or infinite weights in {', '.join(broken[:4])}")
    lines = [
        ("files", ", ".join(file.name for file in found.weights.files)),
        ("dtype", ", ".join(f"{dtype} ({count} tensors)" for dtype, count in dtypes.most_common())),
        ("NaNs", f"in {len(broken)} tensors: {', '.join(broken[:4])}" if broken else "none"),
    ]
    try:
        plan = make_plan(found, state, overrides)
    except InputError as error:
        refused.append(f"load: {error}")
        if found.kind == "foreign":
            evidence = examine(state, found.name)  # no PixArt at all: its error is the answer
            told = ", ".join(f"{name} {value}" for name, value in evidence.fields.items())
            lines = [("format", evidence.format), ("tensors say", told), *lines]
            lines.append(("null caption", "present" if evidence.has_null else "absent"))
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


def _variant(card: ModelCard) -> str:
    names = [name for name, config in PRESETS.items() if config == card.model and "-" in name]
    family = "PixArt-Σ" if is_sigma(card.model) else "PixArt-α"
    return f"{family} ({names[0]})" if names else f"{family}, of no released size"


def _facts(plan: Plan) -> list[tuple[str, str]]:
    card, c = plan.card, plan.card.model
    count = sum(parameter.numel() for parameter in plan.model.parameters())
    pixels = c.latent_size * card.vae.downsample
    blocks = ", ".join(map(str, c.kv_blocks))
    return [
        ("resolution", f"{pixels} px (latents {c.latent_size} × {c.latent_size})"),
        ("parameters", f"{count:,}"),
        ("network", f"{c.depth} blocks of width {c.hidden_size}, {c.num_heads} heads, patch {c.patch_size}"),
        ("positions", f"scale {c.position_scale:g}"),
        ("micro-conditions", "yes" if c.micro_conditions else "no"),
        ("key compression", f"{c.kv_compression}, ratio {c.kv_ratio}, blocks {blocks}" if blocks else "none"),
        ("qk-norm", "yes" if c.qk_norm else "no"),
        ("captions", f"{c.caption_length} tokens of {card.text.model}, {c.caption_channels} wide"),
        ("null caption", f"{'present' if plan.has_null else 'absent'}; sampling takes {card.text.null}"),
        ("VAE", f"{card.vae.kind} {card.vae.source}".strip()),
        ("diffusion", f"{card.diffusion.schedule}, {card.diffusion.prediction}"),
    ]
