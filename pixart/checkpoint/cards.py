"""What a foreign file means without saying: the card of its variant, and diffusers' settings."""

import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

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
TEXT, VAE = "text_encoder", "vae"  # folders of a pipeline, and beside a model of ours
VAES = {  # is Σ's: Hub id and scaling factor
    False: ("stabilityai/sd-vae-ft-ema", 0.18215),
    True: ("PixArt-alpha/pixart_sigma_sdxlvae_T5_diffusers/vae", 0.13025),
}
# sample_size that α and Σ share → interpolation_scale → whether it is Σ's; at 64 both have 1
_SIGMA_AT = {32: {1: False, 0.5: True}, 64: {}}
_AUTHORS = re.compile(r"PixArt-alpha/PixArt-(Sigma|XL)-")  # on the Hub; Σ at 512 px is there without a pipeline
# settings of diffusers' transformer with one value among PixArts; another means another network
_ONLY = {
    "activation_fn": "gelu-approximate", "norm_type": "ada_norm_single", "norm_elementwise_affine": False,
    "norm_eps": 1e-6, "attention_bias": True, "attention_type": "default", "double_self_attention": False,
    "only_cross_attention": False, "num_vector_embeds": None, "use_linear_projection": False,
}  # fmt: skip
_BETAS = {"beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear", "num_train_timesteps": 1000}
_PREDICTIONS = {"epsilon": "epsilon", "v_prediction": "v", "sample": "x0"}


def implied_card(config: PixArtConfig, evidence: Evidence, found: Found) -> ModelCard:
    """The card of a released variant; what a pipeline folder holds besides takes the place of the Hub's files.

    The null caption of α is its buffer, of Σ the empty text; without a buffer it is diffusers' reading, the empty text
    under its own mask (an official Σ file has always the first).
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
    """A card with the VAE and text encoder that the model's own folder holds, or diffusers' pipeline around it.

    The card names those of the export, which need not be there any more. Its scale stays: the latents have it.
    """
    if card.vae.kind == "kl" and (vae := _part(found, VAE)) is not None:
        card = replace(card, vae=replace(card.vae, source=str(vae)))
    if (text := _part(found, TEXT)) is not None:
        card = replace(card, text=replace(card.text, model=str(text)))
    return card


def settings_fields(found: Found, evidence: Evidence, overrides: dict[str, Any]) -> dict[str, Any]:
    """Fields of `PixArtConfig` by diffusers' `config.json`; its other settings must be PixArt's and the tensors'.

    Raises:
        InputError: a setting of another network, or one that the tensors contradict.
    """
    settings = found.settings
    if settings is None:
        return {}
    for key, only in _ONLY.items():
        if (value := settings.get(key, only)) != only:
            raise InputError(f"{found.name}: its config.json says {key} {value!r}, PixArt's is {only!r}")
    for key in ("num_attention_heads", "attention_head_dim", "sample_size", "num_layers", "patch_size", "in_channels"):
        if not isinstance(settings.get(key, 1), int):
            raise InputError(f"{found.name}: its config.json says {key} {settings[key]!r}, expected a whole number")
    heads, size = settings.get("num_attention_heads", 16), settings.get("sample_size", 128)
    micro, scale = settings.get("use_additional_conditions"), settings.get("interpolation_scale")
    own = evidence.fields
    checked = {
        "hidden_size": heads * settings.get("attention_head_dim", 72), "depth": settings.get("num_layers", 28),
        "patch_size": settings.get("patch_size", 2), "in_channels": settings.get("in_channels", 4),
        "caption_channels": settings.get("caption_channels", 4096), "latent_size": size,
        "micro_conditions": size == 128 if micro is None else micro,
        "position_scale": scale,
    }  # fmt: skip
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
        "num_heads": heads, "latent_size": size,
        "position_scale": float(max(size // 64, 1) if scale is None else scale),  # diffusers' own default
        **length,
    }  # fmt: skip


def _part(found: Found, name: str) -> Path | None:
    """The folder of a part beside a model of ours, or of the pipeline around a transformer, if it is there."""
    if found.home is None or not (found.home / name / "config.json").is_file():
        return None
    return (found.home / name).resolve()


def _says_sigma(found: Found, settings: dict, size: int, micro: bool) -> bool | None:
    """Σ or α: by the pipeline's class, else by size, scale or the authors' repository; None where it may be either's.

    The authors' converter writes `interpolation_scale` and `use_additional_conditions` for both; diffusers' older
    script, which is for α alone, neither.
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
    """The process by a scheduler's settings; all of PixArt's are the same chain of β."""
    settings = read_json(path)
    for key, only in _BETAS.items():
        value = settings.get(key, only)
        if not (math.isclose(value, only, rel_tol=1e-6) if isinstance(only, float) else value == only):
            raise InputError(f"{path}: {key} is {value!r}, expected PixArt's {only!r}")
    prediction = settings.get("prediction_type", "epsilon")
    if prediction not in _PREDICTIONS:
        raise InputError(f"{path}: prediction_type {prediction!r}, expected one of {', '.join(_PREDICTIONS)}")
    return DiffusionConfig(prediction=_PREDICTIONS[prediction])
