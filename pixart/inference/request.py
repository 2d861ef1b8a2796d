"""`Request`: an image to draw; `Drawn`: its result."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from PIL import Image
from torch import Tensor

from pixart.arguments import check_types, say
from pixart.errors import InputError
from pixart.prompt import check_no_settings
from pixart.unicode import is_whole

STRENGTH, STRENGTH_WITH_MASK = 0.6, 1.0
ImageSource = Image.Image | str | Path | Tensor


@dataclass(frozen=True, eq=False)
class Request:
    """An image to draw. Defaults are the model's: its native size, its null caption.

    Args:
        prompt: None with `text_embeddings`, the states (L, C) of a prompt's real tokens.
        seed: of the noise.
        negative: a negative prompt, which replaces the null caption and has its own mask.
        height, width: in pixels.
        aspect_ratio: height / width, in place of both: selects the official size with the nearest ratio.
        sizes: "exact" generates the requested size; "official" generates the official size with the nearest ratio, then
            resizes and crops to the requested size.
        image: an image to start from in place of noise: a PIL image, a file, or pixels (3, H, W) in [-1, 1]. It keeps
            its own size, whose sides must be the multiples that the model needs; with a height, a width, an aspect
            ratio or official sizes it is scaled to cover that size and center-cropped, as in training. Transparency
            becomes white.
        latents: clean scaled latents (C, h, w), in place of an image.
        strength: fraction of the steps that are done, in (0, 1]: the last int(steps · strength) of them. By default 0.6
            for an image, which keeps its layout but may change its appearance, and 1 with a mask, so that redrawn parts
            do not depend on what was there before. At 1 sampling starts from pure noise, so that without a mask the
            image has no effect.
        mask: of the same size as the image: white or 1 where it is redrawn, black or 0 where its pixels are kept, grey
            blends the two. A PIL image, a file, or a tensor (H, W) in [0, 1].
        conditions: further inputs of a network variant, for one image.

    Raises:
        InputError: the arguments do not fit together, or the strength is outside (0, 1]. Files are read later.
    """

    prompt: str | None = None
    seed: int = 0
    negative: str | None = None
    height: int | None = None
    width: int | None = None
    aspect_ratio: float | None = None
    sizes: Literal["exact", "official"] = "exact"
    image: ImageSource | None = None
    latents: Tensor | None = None
    strength: float | None = None
    mask: ImageSource | None = None
    text_embeddings: Tensor | None = None
    conditions: Mapping[str, Tensor] = field(default_factory=dict)

    def __post_init__(self):
        if (self.prompt is None) == (self.text_embeddings is None):
            raise InputError("prompts and text_embeddings: give exactly one of them")
        check_types(self)
        for name in ("prompt", "negative"):
            text = getattr(self, name)
            if text is not None and not is_whole(text):
                raise InputError(
                    f"{name}: got {say(text)}, expected a text without halves of characters (lone surrogates)"
                )
            if text is not None:
                check_no_settings(text, name)
        if self.image is not None and self.latents is not None:
            raise InputError("image and latents: both say what to start from; give only one of them")
        for name in ("strength", "mask"):
            if self.image is None and self.latents is None and getattr(self, name) is not None:
                raise InputError(
                    f"{name} without an image: there is nothing to start from; give image= or --image, too"
                )
        number = isinstance(self.strength, (int, float)) and not isinstance(self.strength, bool)
        if self.strength is not None and not (number and 0 < self.strength <= 1):
            raise InputError(f"strength: got {say(self.strength)}, expected a number above 0, up to 1")


def strength_of(request: Request) -> float | None:
    """The strength of a request with its default filled in; None if it starts from noise."""
    if request.image is None and request.latents is None:
        return None
    if request.strength is None:
        return STRENGTH if request.mask is None else STRENGTH_WITH_MASK
    return request.strength


@dataclass(frozen=True, eq=False)
class Drawn:
    """The result of a request; of `image`, `pixels` and `latents`, only the requested one is set."""

    index: int  # of the request, from 0
    request: Request
    image: Image.Image | None = None
    pixels: Tensor | None = None  # (3, H, W) in [-1, 1], not clipped
    latents: Tensor | None = None  # (C, h, w), scaled, as generated

    @property
    def result(self) -> Image.Image | Tensor:
        """The requested output."""
        return next(value for value in (self.image, self.pixels, self.latents) if value is not None)


def check_negative(null: str | None, guidance: float) -> None:
    """Refuse a negative prompt that would have no effect."""
    if null is not None or guidance == 1:
        other = f"cannot be combined with null '{null}'" if null is not None else "have no effect with guidance 1 (off)"
        raise InputError(f"negative_prompts replace the null caption: they {other}")


def make_requests(
    prompts: Sequence[str] | None,
    states: Sequence[Tensor] | None,
    seeds: Sequence[int],
    each: int,
    given: Mapping[str, Any],
    conditions: Mapping[str, Tensor],
    **common,
) -> list[Request]:
    """A request for each of `seeds`; `each` consecutive ones belong to the same prompt or states.

    Args:
        given: field → one value for all, one for each prompt, or None.
        conditions: name → (n, …) for all n requests.
        common: further fields, the same for all.

    Raises:
        InputError: a field has another number of values.
    """
    count = len(seeds) // each
    fields = {"prompt": prompts or [None] * count, "text_embeddings": states or [None] * count}
    fields |= {name: _one_each(name, value, count) for name, value in given.items()}
    for name, value in conditions.items():
        if len(value) != len(seeds):
            raise InputError(f"conditions: got {len(value)} of '{name}', expected one for each of {len(seeds)} images")
    return [
        Request(
            seed=seed,
            conditions={name: value[i] for name, value in conditions.items()},
            **{name: values[i // each] for name, values in fields.items()},
            **common,
        )
        for i, seed in enumerate(seeds)
    ]


def _one_each(name: str, given: Any, count: int) -> Sequence[Any]:
    """One value for each of `count` prompts; a tensor is one value (C, H, W), one mask (H, W), or a batch of these."""
    if isinstance(given, Tensor):
        if given.ndim < 4 and not (name == "mask" and given.ndim == 3 and len(given) == count > 1):
            given = [given]
        many = list(given)
    else:
        many = list(given) if isinstance(given, (list, tuple)) else [given]
    if len(many) not in (1, count):
        raise InputError(f"{name}: got {len(many)} for {count} prompts, expected one, or one for each")
    return many * count if len(many) == 1 else many
