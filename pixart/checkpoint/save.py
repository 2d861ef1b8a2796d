"""A model in any format: ours, the authors' .pth, diffusers' transformer folder or its whole pipeline."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Literal, get_args

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from pixart.arguments import checked
from pixart.checkpoint.cards import TEXT, VAE, implied_card
from pixart.checkpoint.detect import complete, examine, is_sigma
from pixart.checkpoint.files import CONFIG, ModelCard, save_model
from pixart.checkpoint.keys import NULL_CAPTION, to_diffusers
from pixart.checkpoint.load import non_finite
from pixart.checkpoint.locate import CLASSES, PIPELINE, SIDE_CARD, SIDE_NULL, TRANSFORMER_FILES, Found
from pixart.checkpoint.parts import check_parts, copy_text, copy_vae, describe_parts, local_parts, portable
from pixart.checkpoint.weights import CARD_KEY, Weights
from pixart.config import differences, names_with
from pixart.diffusion.schedule import DiffusionConfig
from pixart.encoders.text import find_text_parts
from pixart.errors import InputError
from pixart.files import write_file, write_folder
from pixart.model.pixart import PixArt, PixArtConfig

Format = Literal["ours", "official", "diffusers", "diffusers-pipeline"]
FORMATS: tuple[str, ...] = get_args(Format)


def save(
    model: PixArt, card: ModelCard, target: str | Path, format: Format, *, parts: bool = True
) -> list[str]:  # fmt: skip
    """Write a model whole or not at all, its weights in the dtype that they have.

    No card that is written names a place of this machine: see `parts.portable`.

    Args:
        target: a .pth file for "official", a folder for the others; must not be there.
        format: "ours" (a folder with the card, and the VAE and text encoder that are on this machine alone), "official"
            (the authors' .pth), "diffusers" (the transformer's folder; the null caption, for which it has no place, in
            a side file), "diffusers-pipeline" (with the VAE and text encoder that the card names, and a scheduler).
        parts: False leaves VAE and text encoder out of "ours".

    Returns:
        what became of a VAE and text encoder that are on this machine alone, as lines.

    Raises:
        InputError: the target is there, or the format cannot express the model; says why.
        OSError: the disk is full or not writable; nothing is left behind.
    """
    target = Path(target)
    if format not in FORMATS:
        raise InputError(f"format '{format}': expected one of {', '.join(FORMATS)}")
    if target.exists() or target.is_symlink():
        raise InputError(f"{target} is already there; remove it, or name another target")
    if format == "official" and target.suffix == ".safetensors":
        raise InputError(
            f"{target}: the authors' format is a file of torch.save; name it {target.stem}.pth, or use --to ours or "
            "diffusers, which hold safetensors"
        )
    if kind := getattr(model, "adapted", None):
        raise InputError(
            f"{target}: the network has an adapter '{kind}', which this format has no place for; keep the adapter's "
            "own folder, which names its base"
        )
    card = replace(card, model=model.config)
    state = {name: tensor.detach().cpu() for name, tensor in model.state_dict().items()}
    if why := refusal(card, format, has_null=has_null_caption(state)):
        raise InputError(f"{target}: {why}")
    local = local_parts(card)
    copied = local if format == "diffusers-pipeline" or (format == "ours" and parts) else {}
    check_parts(copied)
    if format == "official":
        write_file(target, lambda path: _write_official(path, state, model, portable(card)))
    elif format == "ours":
        write_folder(target, lambda folder: _write_ours(folder, state, card, copied))
    elif format == "diffusers":
        write_folder(target, lambda folder: _write_transformer(folder, state, portable(card)), manifest=False)
    else:
        write_folder(target, lambda folder: _write_pipeline(folder, state, card), manifest=False)
    return describe_parts(local, copied=bool(copied))


@checked
def export_model(
    model: PixArt, target: str | Path, format: Format = "ours", *, card: ModelCard | None = None
) -> list[str]:  # fmt: skip
    """Write a network in any format, as `save`, with the card that it was loaded with unless another is given.

    Args:
        target: a new folder; a new .pth file with format "official".
        format: "ours", "official", "diffusers" or "diffusers-pipeline", see `save`.
        card: all that sampling needs besides, whose `model` is the network's config; one made in Python needs it.

    Returns:
        what became of a VAE and text encoder that are on this machine alone, as lines.

    Raises:
        InputError: the target is there, the format cannot express the model, or there is no card.
        OSError: the disk is full or not writable; nothing is left behind.
    """
    card = card or getattr(model, "card", None)
    if card is None:
        raise InputError(
            "card: a network made in Python says nothing of its text encoder, autoencoder and diffusion; give it as "
            "card=ModelCard(diffusion=…, vae=…, text=…)"
        )
    return save(model, card, target, format)


def has_null_caption(state: dict[str, Tensor]) -> bool:
    """Whether a model has a null caption of its own; zeros stand for none, as in a file of diffusers."""
    return bool(state[NULL_CAPTION].any())


def refusal(card: ModelCard, format: str, *, has_null: bool) -> str | None:
    """Why a format cannot express a model, or None."""
    c = card.model
    if format == "official" and not has_null:
        return (
            "the model has no null caption (y_embedder.y_embedding), which an official file needs: the source was "
            "diffusers' format without our side file; give one with --null-caption FILE, as the authors' .pth"
        )
    if format.startswith("diffusers") and (named := _unknown_to_diffusers(c)):
        return f"diffusers' PixArt has no {', '.join(named)}; use --to ours or official"
    if format == "diffusers-pipeline":
        plain = DiffusionConfig()
        if (card.diffusion.schedule, card.diffusion.prediction) != (plain.schedule, plain.prediction):
            return (
                f"diffusers' PixArt pipelines sample schedule '{plain.schedule}' with prediction '{plain.prediction}', "
                f"this model has '{card.diffusion.schedule}' and '{card.diffusion.prediction}'; use --to diffusers"
            )
        if c.micro_conditions and c.latent_size != 128:  # pipeline_pixart_alpha.py asks for sample_size == 128
            return (
                "diffusers' PixArtAlphaPipeline tells size and aspect ratio to models of latent_size 128 alone, this "
                f"one's is {c.latent_size}; use --to diffusers"
            )
        if card.vae.kind != "kl":
            return f"diffusers' PixArt pipelines have a VAE, this model denoises pixels (vae.kind {card.vae.kind})"
    return None


def _unknown_to_diffusers(config: PixArtConfig) -> list[str]:
    """What diffusers has no setting for, in words."""
    plain = type(config)()
    values = {
        name: getattr(config, name)
        for name in names_with(type(config), "diffusers", "default")
        if getattr(config, name) != getattr(plain, name)
    }
    words = {"kv_compression": f"key compression ({config.kv_compression})"}
    return [words.get(name, name if value is True else f"{name} {value}") for name, value in values.items()]


def _write_ours(folder: Path, state: dict[str, Tensor], card: ModelCard, parts: dict[str, str]) -> None:
    save_model(folder, state, portable(card, copied=bool(parts)))
    if TEXT in parts:
        copy_text(card.text, folder / TEXT, folder / TEXT)
    if VAE in parts:
        copy_vae(card.vae.source, card.vae.scale, folder / VAE)


def _write_official(path: Path, state: dict[str, Tensor], model: PixArt, card: ModelCard) -> None:
    """`state_dict` with the position table first, as the authors' files have it; a card where that would mislead."""
    side = card.model.latent_size // card.model.patch_size
    table = model.positions(side, side)[None].to(state[NULL_CAPTION].dtype)
    tensors = {"pos_embed": table, **{name: _own(tensor) for name, tensor in state.items()}}
    payload: dict = {"state_dict": tensors}
    if _is_misread(tensors, card):
        payload[CARD_KEY] = json.dumps(differences(card))
    torch.save(payload, path)


def _is_misread(tensors: dict[str, Tensor], card: ModelCard) -> bool:
    """Whether the tensors alone would be refused or taken for another model: custom heads, modules, VAE, prediction."""
    try:
        evidence = examine(tensors, "the model")
        config = complete(evidence, {}, None, "the model")
    except InputError:
        return True
    return implied_card(config, evidence, Found("the model", "foreign", Weights(()))) != card


def attach_null_caption(model: PixArt, card: ModelCard, source: str | Path) -> ModelCard:
    """Give a model of diffusers the null caption that its format has no place for, from any file that has one.

    Returns:
        the card, by which sampling takes it.
    """
    path = Path(source)
    state = Weights((path,)).read()
    own = model.y_embedder.y_embedding
    found = state.get(NULL_CAPTION)
    if found is None or found.shape != own.shape or non_finite(found):
        got = f"nothing of the name {NULL_CAPTION}" if found is None else f"one of shape {tuple(found.shape)}"
        raise InputError(f"{path}: expected a finite null caption of shape {tuple(own.shape)}, found {got}")
    own.copy_(found)
    return replace(card, text=replace(card.text, null="empty" if is_sigma(model.config) else "buffer"))


def _write_transformer(folder: Path, state: dict[str, Tensor], card: ModelCard) -> None:
    """diffusers' transformer: config and weights; our card and the null caption as side files."""
    c = card.model
    settings = {
        "_class_name": CLASSES[0], "_diffusers_version": "0.28.0", "activation_fn": "gelu-approximate",
        "attention_bias": True, "attention_head_dim": c.hidden_size // c.num_heads, "attention_type": "default",
        "caption_channels": c.caption_channels, "cross_attention_dim": c.hidden_size, "dropout": 0.0,
        "in_channels": c.in_channels, "interpolation_scale": c.position_scale, "norm_elementwise_affine": False,
        "norm_eps": 1e-6, "norm_num_groups": 32, "norm_type": "ada_norm_single", "num_attention_heads": c.num_heads,
        "num_embeds_ada_norm": 1000, "num_layers": c.depth, "out_channels": c.out_channels,
        "patch_size": c.patch_size, "sample_size": c.latent_size, "upcast_attention": False,
        "use_additional_conditions": c.micro_conditions,
    }  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    _write_json(folder / CONFIG, settings)
    _write_json(folder / SIDE_CARD, differences(card))
    tensors = to_diffusers(state, c.depth, micro_conditions=c.micro_conditions)
    _write_tensors(folder / TRANSFORMER_FILES[0], tensors)
    if has_null_caption(state):
        _write_tensors(folder / SIDE_NULL, {NULL_CAPTION: state[NULL_CAPTION]})


def _write_pipeline(folder: Path, state: dict[str, Tensor], card: ModelCard) -> None:
    """All that PixArtAlphaPipeline or PixArtSigmaPipeline is made of."""
    copy_vae(card.vae.source, card.vae.scale, folder / VAE)
    _check_text(card)
    copy_text(card.text, folder / TEXT, folder / "tokenizer")
    _write_transformer(folder / "transformer", state, portable(card, copied=True))
    (folder / "scheduler").mkdir()
    _write_json(folder / "scheduler" / "scheduler_config.json", {
        "_class_name": "DPMSolverMultistepScheduler", "_diffusers_version": "0.28.0", "algorithm_type": "dpmsolver++",
        "beta_end": 0.02, "beta_schedule": "linear", "beta_start": 1e-4, "num_train_timesteps": 1000,
        "prediction_type": "epsilon", "solver_order": 2, "solver_type": "midpoint", "lower_order_final": True,
    })  # fmt: skip
    _write_json(folder / PIPELINE, {
        "_class_name": "PixArtSigmaPipeline" if is_sigma(card.model) else "PixArtAlphaPipeline",
        "_diffusers_version": "0.28.0", "scheduler": ["diffusers", "DPMSolverMultistepScheduler"],
        "text_encoder": ["transformers", "T5EncoderModel"], "tokenizer": ["transformers", "T5Tokenizer"],
        "transformer": ["diffusers", CLASSES[0]], "vae": ["diffusers", "AutoencoderKL"],
    })  # fmt: skip


def _check_text(card: ModelCard) -> None:
    """Refuse a text encoder that diffusers' pipelines do not take."""
    import transformers

    source, _ = find_text_parts(card.text.model)
    try:
        shape = transformers.AutoConfig.from_pretrained(source)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"text encoder '{source}' cannot be loaded: {reason}; give one with --text-encoder") from None
    if shape.model_type != "t5" or shape.d_model != card.model.caption_channels:
        raise InputError(
            f"text encoder '{source}': a {shape.model_type} of width {shape.hidden_size}; expected a t5 of width "
            f"{card.model.caption_channels}, the only kind that diffusers' PixArt pipelines take"
        )


def _write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    try:
        save_file({name: _own(tensor) for name, tensor in tensors.items()}, path, metadata={"format": "pt"})
    except SafetensorError as error:  # the library's own type for an I/O error
        raise OSError(str(error)) from None


def _own(tensor: Tensor) -> Tensor:
    """A tensor that shares no storage: files are written by storage, and a mapped file's or a matrix's is larger."""
    return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()


def _write_json(path: Path, settings: dict) -> None:
    path.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
