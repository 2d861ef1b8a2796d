"""The settings of the page's form: checked, as requests, and read back from the record of a drawn image."""

import math
import re
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from PIL import Image

from pixart.app.adapters import Strengths
from pixart.arguments import say
from pixart.checkpoint import ModelCard
from pixart.cli import read_settings
from pixart.config import override
from pixart.diffusion.sampling import SampleConfig
from pixart.errors import InputError
from pixart.inference.latents import official_sizes
from pixart.inference.records import read_loras
from pixart.inference.request import Request

NATIVE = "native"  # the model's own size
OWN = "auto"  # the model's own sampler
# fields of SampleConfig that have an input of their own in the form; the others are written in `more`
SHOWN = ("sampler", "steps", "guidance", "guidance_low", "guidance_high", "rescale")


@dataclass(frozen=True)
class Limits:
    """What one request may ask for."""

    pixels: int = 1 << 22  # of one image
    images: int = 16


@dataclass(frozen=True)
class Settings:
    """The values of the form. None, or an empty text, means the model's own value."""

    prompt: str = ""
    negative: str = ""
    seed: int | None = None  # of the first image; None: drawn
    count: int = 1
    size: str = NATIVE  # or HEIGHTxWIDTH in pixels
    sampler: str = OWN
    steps: int | None = None
    guidance: float | None = None
    guidance_low: float | None = None
    guidance_high: float | None = None
    rescale: float | None = None
    strength: float | None = None
    truncate: bool = False
    more: str = ""  # key=value …: further fields of SampleConfig, and null
    adapters: Strengths = ()  # those with a strength other than 0

    def with_seed(self) -> "Settings":
        """The same settings with a seed, drawn if there is none."""
        return self if self.seed is not None else replace(self, seed=secrets.randbelow(1 << 31))

    def check(self, limits: Limits) -> None:
        """Refuse what no model could draw.

        Raises:
            InputError: the prompt is empty, or more is asked for than the limits allow.
        """
        if not self.prompt.strip():
            raise InputError("the prompt is empty; write what the image should show")
        if not 1 <= self.count <= limits.images:
            raise InputError(f"number of images: got {self.count}, expected 1 to {limits.images} (--max-images)")
        if self.size != NATIVE:
            check_pixels(read_size(self.size), limits)

    def config(self, card: ModelCard) -> tuple[SampleConfig, str | None]:
        """The sampling settings, and the kind of null caption if it is not the model's own.

        Another sampler than the model's own starts from the defaults of its options.
        """
        own = card.sample
        if self.sampler not in (OWN, own.sampler):
            kept = {name: getattr(own, name) for name in ("guidance", "guidance_low", "guidance_high", "rescale")}
            own = SampleConfig(sampler=self.sampler, **kept)
        shown = {name: getattr(self, name) for name in SHOWN if name != "sampler" and getattr(self, name) is not None}
        words = self.more.split()
        read_settings(words)  # refuses what is not key=value
        null = [word.partition("=")[2] for word in words if word.startswith("null=")]
        return override(replace(own, **shown), [w for w in words if not w.startswith("null=")]), (null or [None])[-1]

    def requests(self, image: Image.Image | None, mask: Image.Image | None, card: ModelCard) -> list[Request]:
        """One request for each image; `seed` must be set."""
        height, width = native_size(card) if self.size == NATIVE else read_size(self.size)
        start = {} if image is None else {"image": image, "mask": mask, "strength": self.strength}
        return [
            Request(self.prompt, self.seed + i, self.negative or None, height=height, width=width, **start)
            for i in range(self.count)
        ]


def read_form(values: Mapping[str, Any]) -> Settings:
    """What the page sent; numbers may be texts, of which an empty one means the model's own value.

    Args:
        values: by the names of the fields of `Settings`; `adapters` is a mapping from names to strengths, all of which
            are the page's own adapters.

    Raises:
        InputError: a value is not of its field's kind.
    """
    plain = [field for field in fields(Settings) if field.name != "adapters"]
    settings = Settings(**{f.name: _read(f.name, f.type, values.get(f.name), f.default) for f in plain})
    return replace(settings, adapters=read_strengths(values.get("adapters") or {}))


def read_strengths(values: Mapping[str, Any]) -> Strengths:
    """The adapters whose strength is not 0.

    Raises:
        InputError: a strength is not a number.
    """
    read = {name: _read(f"strength of {name}", float, value, 0.0) for name, value in values.items()}
    return tuple((name, strength) for name, strength in read.items() if strength != 0)


def _read(name: str, kind: Any, value: Any, default: Any) -> Any:
    """One value of the form as the kind of its field."""
    if kind is bool or kind is str:
        if value is not None and not isinstance(value, kind):
            raise InputError(f"{name}: got {value!r}, expected {'yes or no' if kind is bool else 'a text'}")
        return default if value is None else value
    if value is None or (isinstance(value, str) and not value.strip()):
        return default
    whole = name in ("seed", "count", "steps")
    try:
        if isinstance(value, bool):
            raise ValueError
        if whole and isinstance(value, str):
            return int(value[:40])
        number = float(value)
        if not math.isfinite(number) or (whole and number != int(number)):
            raise ValueError
    except (TypeError, ValueError):
        raise InputError(f"{name}: got {say(value)}, expected a {'whole number' if whole else 'number'}") from None
    return int(number) if whole else number


def read_record(record: Mapping[str, str]) -> dict[str, Any]:
    """The form's values from the record in an image file, see `pixart.inference.records`; all that it had is replaced.

    Raises:
        InputError: the record is not that of an image drawn by this package.
    """
    if not {"prompt", "seed", "size", "sampler"} <= set(record):
        raise InputError("this image carries no settings; drop a PNG that pixart drew, as it was saved")
    values: dict[str, Any] = {field.name: field.default for field in fields(Settings)}
    values |= {"prompt": record["prompt"], "negative": record.get("negative_prompt", ""), "size": record["size"]}
    try:
        values["seed"] = int(record["seed"])
        for name in SHOWN:
            if name in record:
                values[name] = record[name] if name == "sampler" else float(record[name])
        values["steps"] = int(record["steps"])
        values["strength"] = float(record["strength"]) if "strength" in record else None
        values["adapters"] = read_loras(record.get("lora", ""))
        read_size(record["size"])
    except (ValueError, KeyError) as error:
        raise InputError(
            f"this image's settings cannot be read ({error}); was it changed by another program?"
        ) from None
    others = [f.name for f in fields(SampleConfig) if f.name not in SHOWN and f.name in record]
    words = [f"{name}={record[name]}" for name in (*others, *(["null"] if "null" in record else []))]
    values["more"] = " ".join(
        word.replace(" ", "").replace("(", "[").replace(",)", "]").replace(")", "]") for word in words
    )
    return values


def read_size(text: str) -> tuple[int, int]:
    """ "384x672" → height and width in pixels."""
    match = re.fullmatch(r"\s*(\d{1,6})\s*[x×]\s*(\d{1,6})\s*(\(.*\))?", text)
    if not match:
        raise InputError(f"size: got '{text[:40]}', expected height x width in pixels, as in 384x672")
    return int(match[1]), int(match[2])


def native_size(card: ModelCard) -> tuple[int, int]:
    side = card.model.latent_size * card.vae.downsample
    return side, side


def size_choices(card: ModelCard, limits: Limits) -> list[str]:
    """The model's own table of sizes, from wide to tall, after its native one; those within the limits."""
    buckets = [(bucket.height, bucket.width) for bucket in official_sizes(card)]
    return [NATIVE, *(f"{height}x{width}" for height, width in buckets if height * width <= limits.pixels)]


def check_pixels(size: tuple[int, int], limits: Limits) -> None:
    """Refuse a size in pixels that is above the limit."""
    if size[0] * size[1] > limits.pixels:
        raise InputError(
            f"size {size[0]} × {size[1]} px: {size[0] * size[1]} pixels, expected up to {limits.pixels} (--max-pixels)"
        )
