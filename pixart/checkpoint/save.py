"""Writes a model in any format: ours, the authors' single file, diffusers' transformer folder or its whole pipeline."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Literal, get_args

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from pixart.arguments import checked, say
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
from pixart.model.layers import ROUTING
from pixart.model.pixart import PixArt, PixArtConfig

Format = Literal["ours", "official", "diffusers", "diffusers-pipeline"]
FORMATS: tuple[str, ...] = get_args(Format)


def save(
    model: PixArt,
    card: ModelCard,
    target: str | Path,
    format: Format,
    *,
    parts: bool = True,
    null_caption: bool = True,
) -> list[str]:
    """Write a model atomically, its weights in the dtype that they have.

    The written card contains no paths of this machine: see `parts.portable`.

    Args:
        target: a .pth or .safetensors file for "official", a folder for the others; must not exist.
        format: "ours" (a folder with the card, and a VAE and text encoder that exist only on this machine), "official"
            (the authors' file, or the same tensors in safetensors), "diffusers" (the transformer's folder; the null
            caption, which is not part of that format, in a side file), "diffusers-pipeline" (with the card's VAE and
            text encoder, and a scheduler).
        parts: False leaves VAE and text encoder out of "ours".
        null_caption: False leaves the null caption out of "official", for readers that encode the empty prompt instead.

    Returns:
        lines of text: what was done with a VAE and text encoder that exist only on this machine.

    Raises:
        InputError: the target exists, or the format cannot represent the model; says why.
        OSError: the disk is full or not writable; no partial file is left.
    """
    target = Path(target)
    if format not in FORMATS:
        raise InputError(f"format {say(format)}: expected one of {', '.join(FORMATS)}")
    if target.exists() or target.is_symlink():
        raise InputError(f"{target} is already there; remove it, or name another target")
    if kind := getattr(model, "adapted", None):
        raise InputError(
            f"{target}: the network has an adapter '{kind}', which this format has no place for; keep the adapter's "
            "own folder, which names its base"
        )
    card = replace(card, model=model.config)
    state = {name: tensor.detach().cpu() for name, tensor in model.state_dict().items()}
    if broken := [name for name, tensor in state.items() if non_finite(tensor)]:
        raise InputError(f"{target}: {broken[0]} has NaN or infinite weights; nothing was written")
    if not null_caption:
        if format != "official":
            raise InputError(f"{target}: the null caption can be left out of official files only, not of {format}")
        state.pop(NULL_CAPTION)
    if why := refusal(card, format, has_null=not null_caption or has_null_caption(state)):
        raise InputError(f"{target}: {why}")
    local = local_parts(card)
    copied = local if format == "diffusers-pipeline" or (format == "ours" and parts) else {}
    check_parts(copied)
    if format == "official":
        write_file(target, lambda path: _write_official(path, target, state, model, portable(card)))
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
) -> list[str]:
    """Write a network in any format, as `save`; by default with the card that it was loaded with.

    Args:
        target: a new folder; a new .pth or .safetensors file with format "official".
        format: "ours", "official", "diffusers" or "diffusers-pipeline", see `save`.
        card: everything that sampling needs besides weights; required for a network that was made in Python.

    Returns:
        lines of text: what was done with a VAE and text encoder that exist only on this machine.

    Raises:
        InputError: the target exists, the format cannot represent the model, or there is no card.
        OSError: the disk is full or not writable; no partial file is left.
    """
    card = card or getattr(model, "card", None)
    if card is None:
        raise InputError(
            "card: a network made in Python says nothing of its text encoder, autoencoder and diffusion; give it as "
            "card=ModelCard(diffusion=…, vae=…, text=…)"
        )
    return save(model, card, target, format)


def has_null_caption(state: dict[str, Tensor]) -> bool:
    """Whether a model has its own null caption; all zeros mean none, as after loading a diffusers file."""
    return bool(state[NULL_CAPTION].any())


def refusal(card: ModelCard, format: str, *, has_null: bool) -> str | None:
    """Why a format cannot represent a model; None if it can."""
    c = card.model
    if format == "official" and not has_null:
        return (
            "the model has no null caption (y_embedder.y_embedding), which an official file needs: the source was "
            "diffusers' format without our side file; give one with --null-caption FILE, as the authors' .pth"
        )
    if format == "official" and (named := unknown_to_official(c)):
        return f"the authors' PixArt has no {', '.join(named)}; use --to ours"
    if format.startswith("diffusers") and (named := unknown_to_diffusers(c)):
        others = "ours" if unknown_to_official(c) else "ours or official"
        return f"diffusers' PixArt has no {', '.join(named)}; use --to {others}"
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


def unknown_to_diffusers(config: PixArtConfig) -> list[str]:
    """Settings that diffusers' PixArt does not have, in words."""
    names = names_with(type(config), "diffusers", "default")
    if config.routing and ROUTING[config.routing].training_only:
        names.remove("routing")
    return _changed(config, names)


def unknown_to_official(config: PixArtConfig) -> list[str]:
    """Settings that the authors' code does not have, in words."""
    names = names_with(type(config), "official", "default")
    if config.qk_norm == "rms_norm":
        names.append("qk_norm")
    if config.kv_compression == "ave":  # theirs of that name selects a token, as "uniform" does
        names.append("kv_compression")
    if config.routing and not ROUTING[config.routing].training_only:
        names.append("routing")
    return _changed(config, names)


def _changed(config: PixArtConfig, names: list[str]) -> list[str]:
    """The settings of `names` that are not at their default, in words."""
    plain = type(config)()
    values = {name: getattr(config, name) for name in names if getattr(config, name) != getattr(plain, name)}
    words = {"kv_compression": f"key compression ({config.kv_compression})"}
    return [words.get(name, name if value is True else f"{name} {value}") for name, value in values.items()]


def _write_ours(folder: Path, state: dict[str, Tensor], card: ModelCard, parts: dict[str, str]) -> None:
    save_model(folder, state, portable(card, copied=bool(parts)))
    if TEXT in parts:
        copy_text(card.text, folder / TEXT, folder / TEXT)
    if VAE in parts:
        copy_vae(card.vae.source, card.vae.scale, folder / VAE)


def _write_official(path: Path, target: Path, state: dict[str, Tensor], model: PixArt, card: ModelCard) -> None:
    """Write the tensors with the position table first, like the authors; with a card if they would be misread.

    A .pth file holds them as `state_dict`, a .safetensors file at its top, the card in its header.
    """
    side = card.model.latent_size // card.model.patch_size
    table = model.positions(side, side)[None].to(model.y_embedder.y_embedding.dtype)
    tensors = {"pos_embed": table, **{name: _own(tensor) for name, tensor in state.items()}}
    own_card = {CARD_KEY: json.dumps(differences(card))} if _is_misread(tensors, card) else {}
    if target.suffix == ".safetensors":
        _write_tensors(path, tensors, own_card)
    else:
        _write_pickle({"state_dict": tensors, **own_card}, path)


def _is_misread(tensors: dict[str, Tensor], card: ModelCard) -> bool:
    """Whether the tensors alone would be refused or read as another model (custom heads, modules, VAE, prediction)."""
    try:
        evidence = examine(tensors, "the model")
        config = complete(evidence, {}, None, "the model")
    except InputError:
        return True
    return implied_card(config, evidence, Found("the model", "foreign", Weights(()))) != card


def attach_null_caption(model: PixArt, card: ModelCard, source: str | Path) -> ModelCard:
    """Give a model from diffusers' format, which has no null caption, that of another file.

    Returns:
        the card with which sampling uses it.

    Raises:
        InputError: the file has no finite null caption of the right shape.
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
    """Write diffusers' transformer folder: config and weights, with our card and the null caption as side files."""
    c = card.model
    settings = {
        "_class_name": CLASSES[0],
        "_diffusers_version": "0.28.0",
        "activation_fn": "gelu-approximate",
        "attention_bias": True,
        "attention_head_dim": c.hidden_size // c.num_heads,
        "attention_type": "default",
        "caption_channels": c.caption_channels,
        "cross_attention_dim": c.hidden_size,
        "dropout": 0.0,
        "in_channels": c.in_channels,
        "interpolation_scale": c.position_scale,
        "norm_elementwise_affine": False,
        "norm_eps": 1e-6,
        "norm_num_groups": 32,
        "norm_type": "ada_norm_single",
        "num_attention_heads": c.num_heads,
        "num_embeds_ada_norm": 1000,
        "num_layers": c.depth,
        "out_channels": c.out_channels,
        "patch_size": c.patch_size,
        "sample_size": c.latent_size,
        "upcast_attention": False,
        "use_additional_conditions": c.micro_conditions,
    }
    folder.mkdir(parents=True, exist_ok=True)
    _write_json(folder / CONFIG, settings)
    _write_json(folder / SIDE_CARD, differences(card))
    tensors = to_diffusers(state, c.depth, micro_conditions=c.micro_conditions)
    _write_tensors(folder / TRANSFORMER_FILES[0], tensors)
    if has_null_caption(state):
        _write_tensors(folder / SIDE_NULL, {NULL_CAPTION: state[NULL_CAPTION]})


def _write_pipeline(folder: Path, state: dict[str, Tensor], card: ModelCard) -> None:
    """Write all parts of a PixArtAlphaPipeline or PixArtSigmaPipeline."""
    copy_vae(card.vae.source, card.vae.scale, folder / VAE)
    _check_text(card)
    copy_text(card.text, folder / TEXT, folder / "tokenizer")
    _write_transformer(folder / "transformer", state, portable(card, copied=True))
    (folder / "scheduler").mkdir()
    _write_json(
        folder / "scheduler" / "scheduler_config.json",
        {
            "_class_name": "DPMSolverMultistepScheduler",
            "_diffusers_version": "0.28.0",
            "algorithm_type": "dpmsolver++",
            "beta_end": 0.02,
            "beta_schedule": "linear",
            "beta_start": 1e-4,
            "num_train_timesteps": 1000,
            "prediction_type": "epsilon",
            "solver_order": 2,
            "solver_type": "midpoint",
            "lower_order_final": True,
        },
    )
    _write_json(
        folder / PIPELINE,
        {
            "_class_name": "PixArtSigmaPipeline" if is_sigma(card.model) else "PixArtAlphaPipeline",
            "_diffusers_version": "0.28.0",
            "scheduler": ["diffusers", "DPMSolverMultistepScheduler"],
            "text_encoder": ["transformers", "T5EncoderModel"],
            "tokenizer": ["transformers", "T5Tokenizer"],
            "transformer": ["diffusers", CLASSES[0]],
            "vae": ["diffusers", "AutoencoderKL"],
        },
    )


def _check_text(card: ModelCard) -> None:
    """Refuse a text encoder that diffusers' pipelines do not support."""
    import transformers

    source, _ = find_text_parts(card.text.model)
    try:
        shape = transformers.AutoConfig.from_pretrained(source, trust_remote_code=False)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"text encoder '{source}' cannot be loaded: {reason}; give one with --text-encoder") from None
    if shape.model_type != "t5" or shape.d_model != card.model.caption_channels:
        raise InputError(
            f"text encoder '{source}': a {shape.model_type} of width {shape.hidden_size}; expected a t5 of width "
            f"{card.model.caption_channels}, the only kind that diffusers' PixArt pipelines take"
        )


def _write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    own = {name: _own(tensor).contiguous() for name, tensor in tensors.items()}
    try:
        save_file(own, path, metadata={"format": "pt", **(metadata or {})})
    except SafetensorError as error:  # the library's own type for an I/O error
        raise OSError(str(error)) from None


def _write_pickle(value: object, path: Path) -> None:
    """As torch.save, whose own errors are of another type and do not say why a file could not be written.

    Raises:
        OSError: the disk is full, or the file cannot be written.
    """
    try:
        with open(path, "wb") as file:
            torch.save(value, file)
    except RuntimeError as error:
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, OSError):
            cause = cause.__context__
        raise cause or OSError(str(error)) from None


def _own(tensor: Tensor) -> Tensor:
    """A tensor with storage of its own size: files hold whole storages, which for views and mapped files are larger."""
    return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()


def _write_json(path: Path, settings: dict) -> None:
    path.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
