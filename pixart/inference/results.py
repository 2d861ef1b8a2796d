"""What a pipeline hands out, and what it says of itself."""

from typing import TYPE_CHECKING, NoReturn

from PIL import Image

if TYPE_CHECKING:
    from pixart.inference.pipeline import Pipeline


class Images(list[Image.Image]):
    """A list of images."""

    @property
    def images(self) -> NoReturn:
        raise AttributeError("the images are returned themselves, as a list: pipeline(…)[0], not pipeline(…).images[0]")


def describe(pipeline: "Pipeline") -> str:
    """A pipeline's parts, a line each."""
    card, parameter = pipeline.card, next(pipeline.model.parameters())
    side = card.model.latent_size * card.vae.downsample
    count = sum(p.numel() for p in pipeline.model.parameters()) / 1e6
    text = f"{card.text.model}, up to {card.text.length} tokens" if pipeline.text else "no text encoder"
    sample = pipeline.settings()
    lines = [
        f"PixArt of {count:.1f} M parameters, {parameter.dtype} on {parameter.device}, native size {side} × {side} px",
        f"text: {text}{', on the CPU but at work' if pipeline.text and pipeline.offload_text else ''}",
        f"autoencoder: {card.vae.kind} {card.vae.source}".rstrip(),
        f"samples by {sample.sampler}, {sample.steps} steps, guidance {sample.guidance:g}",
    ]
    return "Pipeline(\n  " + "\n  ".join(lines) + "\n)"
