"""Starting a training run from other weights: another PixArt, or DiT re-parametrised (PixArt-α, section 2.3)."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from pixart.checkpoint.detect import check_floats, examine
from pixart.checkpoint.files import ModelCard, compare_shapes
from pixart.checkpoint.foreign import is_dit
from pixart.checkpoint.keys import diffusers_parts
from pixart.checkpoint.load import network_card, non_finite
from pixart.checkpoint.locate import Found, locate
from pixart.config import names_with
from pixart.diffusion.schedule import DiffusionConfig
from pixart.errors import InputError
from pixart.model.embed import grid_positions, sinusoid
from pixart.model.pixart import PRESETS, PixArt, PixArtConfig
from pixart.model.positions import resize

DIT_TIME = 500.0  # at this time a PixArt initialised from a DiT equals it
_MICRO = ("csize_embedder.", "ar_embedder.")
_NEW = (".attn.sr.", ".attn.norm.", ".attn.q_norm.", ".attn.k_norm.")  # of KV compression and qk-norm
_NULL = "y_embedder.y_embedding"
_MODULATION = "blocks.{}.adaLN_modulation.1.weight"
_TABLE = "pos_embed.table"  # of learned positions


def start_from(model: PixArt, source: str, *, ema: bool = True, diffusion: DiffusionConfig | None = None) -> list[str]:
    """Load the weights of a DiT, or of any source that `load_model` accepts, into a new `model`.

    For a model on the meta device this only checks that they fit. If the source has a card, the notes include settings
    of the network, and of `diffusion` if given, that differ without changing a shape.

    Returns and raises as `start_from_pixart`; also raises as `load_model` if the source is not a model.
    """
    found = locate(source, ema=ema)
    state = found.weights.read()
    check_floats(state, found.name)
    if broken := [name for name, tensor in state.items() if non_finite(tensor)]:
        raise InputError(f"{source}: {broken[0]} has NaN or infinite weights; the training that wrote it had diverged")
    card = network_card(found)
    dit = card is None and is_dit(state)
    if card is None and not dit:
        evidence = examine(state, found.name)
        if evidence.format == "diffusers":
            table = diffusers_parts(evidence.fields["depth"], micro_conditions=evidence.fields["micro_conditions"])
            side = {_NULL: state[_NULL]} if _NULL in state else {}  # from the side file of our export
            state = {name: torch.cat([state[part] for part in parts]) for name, parts in table.items()} | side
    card = card or found.card
    notes = _check_heads(model, found, card, state)
    if dit:
        return notes + start_from_dit(model, state)
    if card is not None:
        notes += _differences(card, model.config, diffusion)
    if card is not None and card.model.conditioning == "dit" != model.config.conditioning:  # a DiT trained here
        return notes + start_from_dit(model, state)
    if _MODULATION.format(0) in state and model.config.conditioning == "adaln_single":
        state = reparametrise(state)
        notes.append(f"re-parametrised: the blocks' modulations become adaLN-single's, equal at t = {DIT_TIME:g}")
    return notes + start_from_pixart(model, state)


def _check_heads(model: PixArt, found: Found, card: ModelCard | None, state: Mapping[str, Tensor]) -> list[str]:
    """Check the number of heads, which no tensor shape shows: refuse one that differs from the card or the settings. If
    neither states it, note a number other than that of the released models of this width."""
    width, heads = model.config.hidden_size, model.config.num_heads
    if len(state.get("t_embedder.mlp.2.bias", ())) != width:  # refused later, by its shapes
        return []
    told = card.model.num_heads if card else (found.settings or {}).get("num_attention_heads")
    if told is not None and told != heads:
        raise InputError(
            f"{found.name}: its weights are those of {told} heads, model.num_heads is {heads}; set it to {told}"
        )
    released = {preset.hidden_size: preset.num_heads for preset in PRESETS.values()}.get(width)
    if told is None and released not in (None, heads):
        return [f"model.num_heads: {heads} here; released models of width {width} have {released}, the file tells none"]
    return []


def _differences(card: ModelCard, config: PixArtConfig, diffusion: DiffusionConfig | None) -> list[str]:
    """Settings that differ, one line each, except those already reported as new or left-out tensors."""
    pairs = [("model", card.model, config)] + ([("diffusion", card.diffusion, diffusion)] if diffusion else [])
    return [
        f"{section}.{name}: {getattr(before, name)} in the source, {getattr(now, name)} here"
        for section, before, now in pairs
        for name in names_with(type(now), "start", "told")
        if getattr(before, name) != getattr(now, name)
    ]


@torch.no_grad()
def start_from_pixart(model: PixArt, state: Mapping[str, Tensor]) -> list[str]:
    """Load another PixArt's weights (official names) into `model`, which may differ in resolution and text length.

    Fixed positions are computed for the new model. New learned ones are initialised with the sin-cos table; those of
    another native size are interpolated. New micro-conditions get zero output, so that they change nothing; new KV
    compression and qk-norm are initialised as in a new model. Of a null caption of another length, the tokens that both
    have are copied.

    Returns:
        one line for each tensor that was left out or is new.

    Raises:
        InputError: names or shapes differ in any other way.
    """
    notes, target, taken = [], model.state_dict(), {}
    for name, tensor in state.items():
        if name == "pos_embed" or (name == _NULL and not tensor.any()):  # zeros mean: no null caption
            continue
        if name not in target and name.startswith(_MICRO):
            notes.append(f"left out: {name} (the new model has no micro-conditions)")
        elif name == _NULL and tensor.shape != target[name].shape and tensor.shape[1:] == target[name].shape[1:]:
            length = min(len(tensor), len(target[name]))
            taken[name] = torch.cat([tensor[:length].to(target[name]), target[name][length:]])
            notes.append(f"{name}: {length} of {len(target[name])} tokens are taken")
        elif name == _TABLE and name in target and tensor.shape != target[name].shape and tensor.ndim == 2:
            side = math.isqrt(len(target[name]))
            taken[name] = resize(tensor.float(), side, side)
            notes.append(f"{name}: interpolated from {len(tensor)} to {side**2} tokens")
        else:
            taken[name] = tensor
    for name in target.keys() - taken.keys():
        if name.startswith(_MICRO):
            taken[name] = torch.zeros_like(target[name]) if ".mlp.2." in name else target[name]
            notes.append(f"new: {name}")
        elif any(part in name for part in _NEW) or name == _NULL:
            taken[name] = target[name]
            notes.append(f"new: {name}")
        elif name == _TABLE:
            taken[name] = _sincos(model)
            notes.append(f"new: {name}, which starts as the sin-cos positions")
    _load(model, taken, "the weights to start from do not fit this model")
    return sorted(notes)


@torch.no_grad()
def start_from_dit(model: PixArt, state: Mapping[str, Tensor]) -> list[str]:
    """Load a DiT's weights, without its class embeddings, into `model`, whose cross-attention gets zero output.

    With conditioning "adaln_per_block" the modulations are loaded unchanged; with "adaln_single" they are
    re-parametrised, see `reparametrise`.

    Returns and raises as `start_from_pixart`.
    """
    dropped = [name for name in state if name == "pos_embed" or name.startswith("y_embedder.")]
    taken = {name: tensor for name, tensor in state.items() if name not in dropped}
    depth = sum(name.startswith("blocks.") and name.endswith("adaLN_modulation.1.weight") for name in state)
    width, dim = state[_MODULATION.format(0)].shape[1], model.config.hidden_size
    if (depth, width) != (model.config.depth, dim):
        raise InputError(
            f"this DiT has {depth} blocks of width {width}, the new model {model.config.depth} of width {dim}; set "
            f"model.depth and model.hidden_size to the DiT's"
        )
    if model.config.conditioning == "adaln_single":
        taken = reparametrise(taken)
    notes = [f"left out: {name}" for name in dropped if name != "pos_embed"]
    for name, tensor in model.state_dict().items():
        if name in taken:
            continue
        if ".cross_attn." in name or name.startswith(("y_embedder.", *_MICRO)) or any(part in name for part in _NEW):
            zero = name.endswith(("cross_attn.proj.weight", "cross_attn.proj.bias"))
            zero = zero or (name.startswith(_MICRO) and ".mlp.2." in name)
            taken[name] = torch.zeros_like(tensor) if zero else tensor
        elif name == _TABLE:
            taken[name] = _sincos(model)
    _load(model, taken, "this DiT does not fit the new model")
    return [*notes, "new: cross-attention (with zero output), the caption's MLP, the null caption"]


@torch.no_grad()
def reparametrise(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights with adaLN per block, DiT's or ours → those of the adaLN-single network that equals it at t = 500
    (PixArt-α, section 2.3).

    Block i is modulated by W_i·SiLU(time) + b_i. PixArt's table_i + t_block(time) equals this at t = 500 if t_block is
    the mean over blocks and table_i the difference of block i from that mean. The final layer adds the time embedding
    itself, so its table has it subtracted.
    """
    depth = sum(name.startswith("blocks.") and name.endswith("adaLN_modulation.1.weight") for name in state)
    taken = {name: tensor for name, tensor in state.items() if ".adaLN_modulation." not in name}
    weights = torch.stack([state[_MODULATION.format(i)].double() for i in range(depth)])
    biases = torch.stack([state[f"blocks.{i}.adaLN_modulation.1.bias"].double() for i in range(depth)])
    time = _time_embedding(state)  # (D,)
    gated = torch.nn.functional.silu(time)
    tables = (weights - weights.mean(0)) @ gated + biases - biases.mean(0)  # (depth, 6·D)
    final = state["final_layer.adaLN_modulation.1.weight"].double() @ gated
    final = final + state["final_layer.adaLN_modulation.1.bias"].double()  # (2·D,)
    taken["t_block.1.weight"], taken["t_block.1.bias"] = weights.mean(0), biases.mean(0)
    for i, table in enumerate(tables):
        taken[f"blocks.{i}.scale_shift_table"] = table.view(6, len(time))
    taken["final_layer.scale_shift_table"] = final.view(2, len(time)) - time
    return taken


def _sincos(model: PixArt) -> Tensor:
    """The fixed positions of a model whose positions are learned: (N, D)."""
    c = model.config
    side = c.latent_size // c.patch_size
    return grid_positions(side, side, c.hidden_size, base=side, scale=c.position_scale)


def _time_embedding(state: Mapping[str, Tensor]) -> Tensor:
    """DiT's embedding of t = 500, in float64: (D,)."""
    hidden = sinusoid(torch.tensor([DIT_TIME]))[0].double()
    weights = [state[f"t_embedder.mlp.{i}.{kind}"].double() for i in (0, 2) for kind in ("weight", "bias")]
    hidden = torch.nn.functional.silu(weights[0] @ hidden + weights[1])
    return weights[2] @ hidden + weights[3]


def _load(model: PixArt, taken: Mapping[str, Tensor], what: str) -> None:
    target = model.state_dict()
    expected, found = ({n: tuple(t.shape) for n, t in tensors.items()} for tensors in (target, taken))
    if difference := compare_shapes(expected, found):
        raise InputError(f"{what}; {difference}")
    model.load_state_dict({name: tensor.to(target[name]) for name, tensor in taken.items()}, strict=True)
