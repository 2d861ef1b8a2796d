"""One record of what is to be drawn, and one of what was."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from PIL import Image
from torch import Tensor

from pixart.errors import InputError

STRENGTH, STRENGTH_WITH_MASK = 0.6, 1.0
ImageSource = Image.Image | str | Path | Tensor


@dataclass(frozen=True, eq=False)
class Request:
    """An image to draw. What is not given here is the model's: its native size, its null caption.

    Args:
        prompt: None with `text_embeddings`, the states (L, C) of a prompt's real tokens.
        seed: of the noise.
        negative: a prompt in the null caption's place, under its own mask.
        height, width: in pixels.
        aspect_ratio: height / width, in place of both: the official size with the nearest ratio.
        sizes: "official" generates in the official size with the nearest ratio, then resizes and crops to what was
            asked for; "exact" generates that.
        image: where to start from in place of noise: a PIL image, a file, or pixels (3, H, W) in [-1, 1]. It keeps its
            own size, which must be a multiple of what the model needs; with a height, a width, an aspect ratio or
            official sizes it is scaled to cover that size and cropped at the centre, as in training. Transparency
            becomes white.
        latents: clean scaled latents (C, h, w), in place of an image.
        strength: share of the steps that are done, the last int(steps · strength) of all, in (0, 1]. 0.6 for an image
            by default: what is where stays, what it looks like may change. 1 with a mask: what is drawn anew owes
            nothing to what was there before. At 1 it starts from noise alone, without a mask as if no image was given.
        mask: as large as the image, white or 1 where it is drawn anew, black or 0 where its pixels stay as they are;
            grey blends the two. A PIL image, a file, or a tensor (H, W) in [0, 1].
        conditions: what a variant of the network takes besides, of one image each.

    Raises:
        InputError: these do not fit together, or a strength outside (0, 1]. What is in the files is looked at later.
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
            raise InputError("prompts and text_embeddings: give one or the other")
        if self.image is not None and self.latents is not None:
            raise InputError("image and latents: both are where to start from; give one or the other")
        for name in ("strength", "mask"):
            if self.image is None and self.latents is None and getattr(self, name) is not None:
                raise InputError(f"{name} without an image: there is nothing to start from; give image= or --image too")
        number = isinstance(self.strength, (int, float)) and not isinstance(self.strength, bool)
        if self.strength is not None and not (number and 0 < self.strength <= 1):
            raise InputError(f"strength: got {self.strength!r}, expected a number above 0, up to 1")


def strength_of(request: Request) -> float | None:
    """The share of the steps that a request's image is drawn with; None if it starts from nothing."""
    if request.image is None and request.latents is None:
        return None
    if request.strength is None:
        return STRENGTH if request.mask is None else STRENGTH_WITH_MASK
    return request.strength


@dataclass(frozen=True, eq=False)
class Drawn:
    """What came of a request; of `image`, `pixels` and `latents` the one that was asked for."""

    index: int  # of the request, from 0
    request: Request
    image: Image.Image | None = None
    pixels: Tensor | None = None  # (3, H, W) in [-1, 1], not clipped
    latents: Tensor | None = None  # (C, h, w), scaled, as generated

    @property
    def result(self) -> Image.Image | Tensor:
        """The one that was asked for."""
        return next(value for value in (self.image, self.pixels, self.latents) if value is not None)


def check_negative(null: str | None, guidance: float) -> None:
    """Refuse a negative prompt where it would have no effect."""
    if null is not None or guidance == 1:
        other = f"null '{null}'" if null is not None else "guidance 1, which is off,"
        raise InputError(f"negative_prompts stand in the null caption's place: {other} leaves none for them")


def make_requests(
    prompts: Sequence[str] | None, states: Sequence[Tensor] | None, seeds: Sequence[int], each: int,
    given: Mapping[str, Any], conditions: Mapping[str, Tensor], **common,
) -> list[Request]:  # fmt: skip
    """A request for each of `seeds`, `each` of them in a row for each prompt, or its states.

    Args:
        given: by field, one for all or one for each prompt, or None.
        conditions: by name, (n, …) for all n requests.
        common: further fields, the same for all.

    Raises:
        InputError: as many as neither are given.
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
    """One for each of `count` prompts; a tensor is one of (C, H, W), or a mask (H, W), or a batch of them."""
    if isinstance(given, Tensor):
        if given.ndim < 4 and not (name == "mask" and given.ndim == 3 and len(given) == count > 1):
            given = [given]
        many = list(given)
    else:
        many = list(given) if isinstance(given, (list, tuple)) else [given]
    if len(many) not in (1, count):
        raise InputError(f"{name}: got {len(many)} for {count} prompts, expected one, or one for each")
    return many * count if len(many) == 1 else many
