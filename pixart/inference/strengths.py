"""A sheet of images that shows how strongly loaded adapters act: a row for each prompt, a column for each strength."""

from collections.abc import Sequence
from typing import Any

from PIL import Image

from pixart.arguments import checked
from pixart.contact_sheet import contact_sheet
from pixart.errors import InputError
from pixart.inference.pipeline import Pipeline


@checked
def strength_sheet(
    pipeline: Pipeline, prompts: Sequence[str], strengths: Sequence[float], seed: int = 0, **options: Any
) -> Image.Image:
    """Draw every prompt at every strength from the same noise.

    Args:
        strengths: each multiplies the strengths that the adapters have, which are set again afterwards.
        seed: of the noise, the same for all images.
        options: as in a call of the pipeline.

    Raises:
        InputError: no adapter is loaded, or there is no prompt or no strength; else as in a call.
    """
    if not pipeline.loras.loaded:
        raise InputError("strengths: no adapter is loaded whose strength could change; load one first (--lora FILE)")
    if not prompts or not strengths:
        raise InputError(f"strengths: got {len(prompts)} prompts and {len(strengths)} strengths, expected some of each")
    before = {name: each.strength for name, each in pipeline.loras.loaded.items()}
    columns = []
    try:
        for factor in strengths:
            for name, strength in before.items():
                pipeline.set_strength(name, factor * strength)
            columns.append(pipeline(prompts, [seed] * len(prompts), **options))
    finally:
        for name, strength in before.items():
            pipeline.set_strength(name, strength)
    cells = [[column[i]] for i in range(len(prompts)) for column in columns]
    labels = [f"{factor:g}: {prompt}" for prompt in prompts for factor in strengths]
    return contact_sheet(cells, labels, columns=len(strengths))
