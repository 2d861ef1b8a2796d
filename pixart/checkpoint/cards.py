"""The model card that a file without one implies, from its variant and from diffusers' settings."""

import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

from pixart.arguments import say
from pixart.checkpoint.detect import SIGMA_LENGTH, Evidence, contradiction, is_sigma
from pixart.checkpoint.files import ModelCard
from pixart.checkpoint.locate import PIPELINE, Found
from pixart.diffusion.sampling import SampleConfig
from pixart.diffusion.schedule import DiffusionConfig
from pixart.encoders.autoencoder import AutoencoderConfig
from pixart.encoders.text import TextConfig
from pixart.encoders.vae import VaeConfig
from pixart.errors import InputError
from pixart.files import read_json
from pixart.model.pixart import PRESETS, PixArtConfig

T5 = "DeepFloyd/t5-v1_1-xxl"
TEXT, VAE = "text_encoder", "vae"  # folders in a diffusers pipeline, and beside a model in our format
VAES = {  # whether the model is PixArt-Σ: Hub id and scaling factor
    False: ("stabilityai/sd-vae-ft-ema", 0.18215),
    True: ("PixArt-alpha/pixart_sigma_sdxlvae_T5_diffusers/vae", 0.13025),
}
# sample_size of both α and Σ → interpolation_scale → whether it is Σ; at 64 both have scale 1
_SIGMA_AT = {32: {1: False, 0.5: True}, 64: {}}
_AUTHORS = re.compile(r"PixArt-alpha/PixArt-(Sigma|XL)-")  # on the Hub, where Σ at 512 px has no pipeline
# settings of diffusers' transformer that are the same for every PixArt; another value means another network
_ONLY = {
    "activation_fn": "gelu-approximate",
    "norm_type": "ada_norm_single",
    "norm_elementwise_affine": False,
    "norm_eps": 1e-6,
    "attention_bias": True,
    "attention_type": "default",
    "double_self_attention": False,
    "only_cross_attention": False,
    "num_vector_embeds": None,
    "use_linear_projection": False,
}
_BETAS = {"beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear", "num_train_timesteps": 1000}
_PREDICTIONS = {"epsilon": "epsilon", "v_prediction": "v", "sample": "x0"}


def implied_card(config: PixArtConfig, evidence: Evidence, found: Found) -> ModelCard:
    """The card of a released variant; VAE, text encoder and scheduler in a pipeline folder replace those on the Hub.

    The null caption of α is the buffer in its weights, that of Σ the empty text. If a file has no such buffer, it is
    the empty text under its own mask, as in diffusers; an official Σ file always uses the empty text.
    """
    sigma = is_sigma(config)
    null = "empty" if sigma else "buffer"
    if not evidence.has_null and not (sigma and evidence.format == "official"):
        null = "empty_own_mask"
    source, scale = VAES[sigma]
    diffusion, sample = DiffusionConfig(), SampleConfig()
    if (vae := _part(found, VAE)) is not None:
        scale = VaeConfig.from_diffusers(read_json(vae / "config.json")).scaling_factor
    if found.home is not None and (path := found.home / "scheduler" / "scheduler_config.json").is_file():
        diffusion = _diffusion(path)
        if read_json(path).get("_class_name") == "LCMScheduler":
            sample = SampleConfig(sampler="lcm")
    vae_config = AutoencoderConfig() if config.in_channels == 3 else AutoencoderConfig("kl", source, scale)
    card = ModelCard(
        model=config,
        diffusion=diffusion,
        vae=vae_config,
        text=TextConfig(model=T5, length=config.caption_length, clean=not sigma, null=null),
        sample=sample,
    )
    return with_own_parts(card, found)


def with_own_parts(card: ModelCard, found: Found) -> ModelCard:
    """The card with the VAE and text encoder found in the model's folder, or in the diffusers pipeline around it.

    The names in the card are from the time of the export and may no longer exist. Its VAE scale is kept, because the
    model was trained on latents of that scale.
    """
    if card.vae.kind == "kl" and (vae := _part(found, VAE)) is not None:
        card = replace(card, vae=replace(card.vae, source=str(vae)))
    if (text := _part(found, TEXT)) is not None:
        card = replace(card, text=replace(card.text, model=str(text)))
    return card


def settings_fields(found: Found, evidence: Evidence, overrides: dict[str, Any]) -> dict[str, Any]:
    """Fields of `PixArtConfig` from diffusers' `config.json`; the other settings must fit PixArt and the tensors.

    Raises:
        InputError: a setting that no PixArt has, or that contradicts the tensors.
    """
    settings = found.settings
    if settings is None:
        return {}
    for key, only in _ONLY.items():
        if (value := settings.get(key, only)) != only:
            raise InputError(f"{found.name}: its config.json says {key} {say(value)}, PixArt's is {say(only)}")
    for key in ("num_attention_heads", "attention_head_dim", "sample_size", "num_layers", "patch_size", "in_channels"):
        if not isinstance(settings.get(key, 1), int):
            raise InputError(f"{found.name}: its config.json says {key} {say(settings[key])}, expected a whole number")
    if not isinstance(scale := settings.get("interpolation_scale"), (int, float, type(None))):
        raise InputError(f"{found.name}: its config.json says interpolation_scale {say(scale)}, expected a number")
    heads, size = settings.get("num_attention_heads", 16), settings.get("sample_size", 128)
    micro, scale = settings.get("use_additional_conditions"), settings.get("interpolation_scale")
    own = evidence.fields
    checked = {
        "hidden_size": heads * settings.get("attention_head_dim", 72),
        "depth": settings.get("num_layers", 28),
        "patch_size": settings.get("patch_size", 2),
        "in_channels": settings.get("in_channels", 4),
        "caption_channels": settings.get("caption_channels", 4096),
        "latent_size": size,
        "micro_conditions": size == 128 if micro is None else micro,
        "position_scale": scale,
    }
    for name, value in checked.items():
        if value is not None and name in own and value != own[name]:
            raise contradiction(found.name, "its config.json says", name, value, own)
    sigma = _says_sigma(found, settings, size, own["micro_conditions"])
    length = {} if sigma is None else {"caption_length": SIGMA_LENGTH if sigma else PRESETS["XL/2"].caption_length}
    sigma = {**length, **overrides, **own}.get("caption_length") == SIGMA_LENGTH
    sigma_256 = PRESETS["sigma-256"]
    if scale is None and sigma and size == sigma_256.latent_size and "position_scale" not in overrides:
        raise InputError(
            f"{found.name}: its config.json has no interpolation_scale. diffusers takes 1 then, PixArt-Σ at 256 px was "
            f"trained with {sigma_256.position_scale}: pass the right one, as overrides={{'position_scale': "
            f"{sigma_256.position_scale}}} or --set position_scale={sigma_256.position_scale}"
        )
    return {
        "num_heads": heads,
        "latent_size": size,
        "position_scale": float(max(size // 64, 1) if scale is None else scale),  # diffusers' own default
        **length,
    }


def _part(found: Found, name: str) -> Path | None:
    """The folder of a part beside a model in our format, or in the pipeline around a transformer; None if absent."""
    if found.home is None or not (found.home / name / "config.json").is_file():
        return None
    return (found.home / name).resolve()


def _says_sigma(found: Found, settings: dict, size: int, micro: bool) -> bool | None:
    """Whether a diffusers model is Σ: from the pipeline's class, else from size, scale or the authors' repository; None
    if it may be either.

    The authors' converter writes `interpolation_scale` and `use_additional_conditions` for both; diffusers' older
    script, which handles only α, writes neither.
    """
    if found.home is not None:
        kind = str(read_json(found.home / PIPELINE).get("_class_name"))
        if not kind.startswith("PixArt"):
            raise InputError(f"{found.name}: a {kind}, expected PixArtAlphaPipeline or PixArtSigmaPipeline")
        return kind.startswith("PixArtSigma")
    if micro or size >= 128:
        return not micro
    scale, told = settings.get("interpolation_scale"), settings.get("use_additional_conditions")
    if scale is None and told is None:
        return False
    if size in _SIGMA_AT:
        repository = _AUTHORS.match(found.name)
        return repository[1] == "Sigma" if repository else _SIGMA_AT[size].get(scale)
    return scale is not None and told is False  # no released model has that size


def _diffusion(path: Path) -> DiffusionConfig:
    """The diffusion settings from a scheduler's config; every PixArt has the same β."""
    settings = read_json(path)
    for key, only in _BETAS.items():
        value = settings.get(key, only)
        if not (math.isclose(value, only, rel_tol=1e-6) if isinstance(only, float) else value == only):
            raise InputError(f"{path}: {key} is {say(value)}, expected PixArt's {say(only)}")
    prediction = settings.get("prediction_type", "epsilon")
    if prediction not in _PREDICTIONS:
        raise InputError(f"{path}: prediction_type {prediction!r}, expected one of {', '.join(_PREDICTIONS)}")
    return DiffusionConfig(prediction=_PREDICTIONS[prediction])
