"""The list of images that a pipeline returns, and a pipeline's description."""

from typing import TYPE_CHECKING, NoReturn

from PIL import Image

from pixart.errors import InputError

if TYPE_CHECKING:
    from pixart.inference.pipeline import Pipeline


class Images(list[Image.Image]):
    """A list of images."""

    @property
    def images(self) -> NoReturn:
        raise AttributeError(
            "the pipeline returns the list of images itself: pipeline(…)[0], not pipeline(…).images[0]"
        )


def describe(pipeline: "Pipeline") -> str:
    """A pipeline's parts, one per line."""
    card, parameter = pipeline.card, next(pipeline.model.parameters())
    side = card.model.latent_size * card.vae.downsample
    count = sum(p.numel() for p in pipeline.model.parameters()) / 1e6
    text = f"{card.text.model}, up to {card.text.length} tokens" if pipeline.text else "no text encoder"
    try:
        sample = pipeline.settings()
        told = f"{sample.sampler}, {sample.steps} steps, guidance {sample.guidance:g}"
    except InputError as error:  # a model may recommend what no sampler takes
        told = f"settings that do not fit together ({error})"
    lines = [
        f"PixArt of {count:.1f} M parameters, {parameter.dtype} on {parameter.device}, native size {side} × {side} px",
        f"text: {text}{', on the CPU except while encoding' if pipeline.text and pipeline.offload_text else ''}",
        f"autoencoder: {card.vae.kind} {card.vae.source}".rstrip(),
        f"samples by {told}",
    ]
    return "Pipeline(\n  " + "\n  ".join(lines) + "\n)"
