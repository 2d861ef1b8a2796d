"""Starting a training run from other weights: another PixArt, or DiT re-parametrised (PixArt-α, section 2.3)."""

from collections.abc import Mapping

import torch
from torch import Tensor

from pixart.checkpoint.detect import check_floats, examine, is_dit
from pixart.checkpoint.files import ModelCard, compare_shapes
from pixart.checkpoint.keys import diffusers_parts
from pixart.checkpoint.load import network_card, non_finite
from pixart.checkpoint.locate import Found, locate
from pixart.config import names_with
from pixart.diffusion.schedule import DiffusionConfig
from pixart.errors import InputError
from pixart.model.embed import sinusoid
from pixart.model.pixart import PRESETS, PixArt, PixArtConfig

DIT_TIME = 500.0  # the time at which a PixArt that starts from DiT equals it
_MICRO = ("csize_embedder.", "ar_embedder.")
_NEW = (".attn.sr.", ".attn.norm.", ".attn.q_norm.", ".attn.k_norm.")  # of KV compression and qk-norm
_NULL = "y_embedder.y_embedding"


def start_from(model: PixArt, source: str, *, ema: bool = True, diffusion: DiffusionConfig | None = None) -> list[str]:
    """Put the weights of any file or folder that `load_model` takes, or of a DiT, into a new `model`.

    On the meta device this only tells whether they fit. Where the source has a card, settings of the network, and of
    `diffusion` if given, that differ without showing in a shape are among the notes.

    Returns and raises as `start_from_pixart`, and as `load_model` where the source is no model.
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
            side = {_NULL: state[_NULL]} if _NULL in state else {}  # from our export's side file
            state = {name: torch.cat([state[part] for part in parts]) for name, parts in table.items()} | side
    card = card or found.card
    notes = _check_heads(model, found, card, state)
    if dit:
        return notes + start_from_dit(model, state)
    if card is not None:
        notes += _differences(card, model.config, diffusion)
    return notes + start_from_pixart(model, state)


def _check_heads(model: PixArt, found: Found, card: ModelCard | None, state: Mapping[str, Tensor]) -> list[str]:
    """Refuse another number of heads, which no shape shows, than card or settings tell. Where they do not, a note says
    if it is not that of the released models of this width."""
    width, heads = model.config.hidden_size, model.config.num_heads
    if len(state.get("t_embedder.mlp.2.bias", ())) != width:  # which is refused for its shapes
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
    """Settings that differ, a line each, but for those whose tensors are spoken of as new or left out."""
    pairs = [("model", card.model, config)] + ([("diffusion", card.diffusion, diffusion)] if diffusion else [])
    return [
        f"{section}.{name}: {getattr(before, name)} in the source, {getattr(now, name)} here"
        for section, before, now in pairs
        for name in names_with(type(now), "start", "told")
        if getattr(before, name) != getattr(now, name)
    ]


@torch.no_grad()
def start_from_pixart(model: PixArt, state: Mapping[str, Tensor]) -> list[str]:
    """Put another PixArt's weights (official names) into `model`, which may differ in resolution and text length.

    Positions are computed, so they are the new model's. New micro-conditions start with zero output, so they change
    nothing; new KV compression and qk-norm start as in a new model. A null caption of another length is taken as far as
    it goes.

    Returns:
        what was left out or is new, a line each.

    Raises:
        InputError: any other difference of names or shapes.
    """
    notes, target, taken = [], model.state_dict(), {}
    for name, tensor in state.items():
        if name == "pos_embed" or (name == _NULL and not tensor.any()):  # zeros stand for a null caption not known
            continue
        if name not in target and name.startswith(_MICRO):
            notes.append(f"left out: {name} (the new model has no micro-conditions)")
        elif name == _NULL and tensor.shape != target[name].shape and tensor.shape[1:] == target[name].shape[1:]:
            length = min(len(tensor), len(target[name]))
            taken[name] = torch.cat([tensor[:length].to(target[name]), target[name][length:]])
            notes.append(f"{name}: {length} of {len(target[name])} tokens are taken")
        else:
            taken[name] = tensor
    for name in target.keys() - taken.keys():
        if name.startswith(_MICRO):
            taken[name] = torch.zeros_like(target[name]) if ".mlp.2." in name else target[name]
            notes.append(f"new: {name}")
        elif any(part in name for part in _NEW) or name == _NULL:
            taken[name] = target[name]
            notes.append(f"new: {name}")
    _load(model, taken, "the weights to start from do not fit this model")
    return sorted(notes)


@torch.no_grad()
def start_from_dit(model: PixArt, state: Mapping[str, Tensor]) -> list[str]:
    """Put a DiT's weights into `model` so that its blocks and final layer equal DiT's at t = 500.

    DiT modulates block i by W_i·SiLU(c) + b_i with c = time + class. Without the class, PixArt's table_i +
    t_block(time) is the same at t = 500 when t_block is the blocks' mean and table_i what is missing there. The final
    layer adds the time embedding itself, so its table subtracts that. Cross-attention starts with zero output.

    Returns and raises as `start_from_pixart`.
    """
    dropped = [name for name in state if name == "pos_embed" or name.startswith("y_embedder.")]
    modulations = [name for name in state if ".adaLN_modulation." in name]
    taken = {name: tensor for name, tensor in state.items() if name not in {*dropped, *modulations}}
    depth = sum(name.startswith("blocks.") and name.endswith(".weight") for name in modulations)
    width, dim = state["blocks.0.adaLN_modulation.1.weight"].shape[1], model.config.hidden_size
    if (depth, width) != (model.config.depth, dim):
        raise InputError(
            f"this DiT has {depth} blocks of width {width}, the new model {model.config.depth} of width {dim}; set "
            f"model.depth and model.hidden_size to the DiT's"
        )
    weights = torch.stack([state[f"blocks.{i}.adaLN_modulation.1.weight"].double() for i in range(depth)])
    biases = torch.stack([state[f"blocks.{i}.adaLN_modulation.1.bias"].double() for i in range(depth)])
    time = _time_embedding(state)  # (D,)
    gated = torch.nn.functional.silu(time)
    tables = (weights - weights.mean(0)) @ gated + biases - biases.mean(0)  # (depth, 6·D)
    final = state["final_layer.adaLN_modulation.1.weight"].double() @ gated
    final = final + state["final_layer.adaLN_modulation.1.bias"].double()  # (2·D,)
    taken["t_block.1.weight"], taken["t_block.1.bias"] = weights.mean(0), biases.mean(0)
    for i, table in enumerate(tables):
        taken[f"blocks.{i}.scale_shift_table"] = table.view(6, width)
    taken["final_layer.scale_shift_table"] = final.view(2, width) - time
    notes = [f"left out: {name}" for name in dropped if name != "pos_embed"]
    for name, tensor in model.state_dict().items():
        if ".cross_attn." in name or name.startswith(("y_embedder.", *_MICRO)) or any(part in name for part in _NEW):
            zero = name.endswith(("cross_attn.proj.weight", "cross_attn.proj.bias"))
            zero = zero or (name.startswith(_MICRO) and ".mlp.2." in name)
            taken[name] = torch.zeros_like(tensor) if zero else tensor
    _load(model, taken, "this DiT does not fit the new model")
    return [*notes, "new: cross-attention (with zero output), the caption's MLP, the null caption"]


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
