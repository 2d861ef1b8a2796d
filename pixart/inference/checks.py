"""Checks of a pipeline's arguments, made before any work; what may be given once for all is repeated for each image."""

from collections.abc import Sequence

from torch import Tensor

from pixart.arguments import say
from pixart.errors import InputError
from pixart.inference.request import check_negative

MOST_IMAGES = 1_000_000  # of a prompt, or in a batch


def check_counts(output: str, images_per_prompt: int, batch_size: int) -> None:
    if output not in ("image", "latent", "pixels"):
        raise InputError(f"output: got {say(output)}, expected image, latent or pixels")
    if images_per_prompt < 1 or batch_size < 1:
        raise InputError(
            f"got images_per_prompt {say(images_per_prompt)} and batch_size {say(batch_size)}, expected at least 1"
        )
    for name, value in (("images_per_prompt", images_per_prompt), ("batch_size", batch_size)):
        if value > MOST_IMAGES:
            raise InputError(f"{name}: got {say(value)}, expected at most {MOST_IMAGES}")


def check_embeddings(states: Tensor, mask: Tensor, channels: int) -> None:
    """Refuse text embeddings whose shapes are not (B, L, channels) and (B, L)."""
    if states.ndim != 3 or states.shape[-1] != channels or mask.shape != states.shape[:2]:
        raise InputError(
            f"text_embeddings: got states {tuple(states.shape)} and mask {tuple(mask.shape)}, expected "
            f"(B, L, {channels}) and (B, L)"
        )


def seed_each(seeds: int | Sequence[int], count: int, each: int) -> list[int]:
    """A seed for every image of `count` prompts with `each` images; a single number is that of a prompt's first one.

    Raises:
        InputError: there are no prompts, or the number of seeds is not that of the images.
    """
    if not count:
        raise InputError("got no prompts, expected at least one")
    if not isinstance(seeds, Sequence):
        return [int(seeds) + i for _ in range(count) for i in range(each)]
    if len(seeds) != count * each:
        raise InputError(f"got {len(seeds)} seeds, expected one for each of {count * each} images, or a single number")
    return [int(seed) for seed in seeds]


def negative_each(
    prompts: str | Sequence[str] | None, count: int, null: str | None, guidance: float
) -> Sequence[str] | None:
    """A negative prompt for each of `count` prompts, or None without any.

    Raises:
        InputError: they would have no effect, or there are neither one nor `count` of them.
    """
    if prompts is None:
        return None
    check_negative(null, guidance)
    prompts = [prompts] * count if isinstance(prompts, str) else prompts
    if len(prompts) != count:
        raise InputError(f"got {count} prompts and {len(prompts)} negative ones, expected one, or one for each prompt")
    return prompts
