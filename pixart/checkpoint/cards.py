"""What a foreign file means without saying: the card of its variant, and diffusers' settings."""

import math
from pathlib import Path
from typing import Any

from pixart.checkpoint.detect import SIGMA_LENGTH, Evidence, contradiction, is_sigma
from pixart.checkpoint.files import ModelCard
from pixart.checkpoint.locate import PIPELINE, Found, read_json
from pixart.diffusion.sampling import SampleConfig
from pixart.diffusion.schedule import DiffusionConfig
from pixart.errors import InputError
from pixart.model.autoencoder import AutoencoderConfig
from pixart.model.pixart import PRESETS, PixArtConfig
from pixart.model.text import TextConfig
from pixart.model.vae import VaeConfig

T5 = "DeepFloyd/t5-v1_1-xxl"
VAES = {  # is Σ's: Hub id and scaling factor
    False: ("stabilityai/sd-vae-ft-ema", 0.18215),
    True: ("PixArt-alpha/pixart_sigma_sdxlvae_T5_diffusers/vae", 0.13025),
}
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
    text, diffusion, sample = T5, DiffusionConfig(), SampleConfig()
    if found.pipeline is not None:
        vae = found.pipeline / "vae"
        if (vae / "config.json").is_file():
            source, scale = str(vae.resolve()), VaeConfig.from_diffusers(read_json(vae / "config.json")).scaling_factor
        if (found.pipeline / "text_encoder" / "config.json").is_file():
            text = str((found.pipeline / "text_encoder").resolve())
        if (scheduler := found.pipeline / "scheduler" / "scheduler_config.json").is_file():
            diffusion = _diffusion(scheduler)
            if read_json(scheduler).get("_class_name") == "LCMScheduler":
                sample = SampleConfig(sampler="lcm")
    vae_config = AutoencoderConfig() if config.in_channels == 3 else AutoencoderConfig("kl", source, scale)
    return ModelCard(
        model=config,
        diffusion=diffusion,
        vae=vae_config,
        text=TextConfig(model=text, length=config.caption_length, clean=not sigma, null=null),
        sample=sample,
    )


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
            raise contradiction(found.name, "its config.json says", name, value, evidence)
    sigma = _says_sigma(found, settings, size, own["micro_conditions"])
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
        "caption_length": SIGMA_LENGTH if sigma else PRESETS["XL/2"].caption_length,
    }  # fmt: skip


def _says_sigma(found: Found, settings: dict, size: int, micro: bool) -> bool:
    """Σ or α: by the pipeline's class, else by size; at 256 and 512 px by what only Σ's converter writes."""
    if found.pipeline is not None:
        kind = str(read_json(found.pipeline / PIPELINE).get("_class_name"))
        if not kind.startswith("PixArt"):
            raise InputError(f"{found.name}: a {kind}, expected PixArtAlphaPipeline or PixArtSigmaPipeline")
        return kind.startswith("PixArtSigma")
    if micro or size >= 128:
        return not micro
    return settings.get("interpolation_scale") is not None and settings.get("use_additional_conditions") is False


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
