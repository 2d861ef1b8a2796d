"""Named arrays per image, for the network or the objective: control images, features of a vision model, and the like.

An array is computed from an image's pixels or read from a file beside the image; a feature store keeps it, so that it
is computed only once. `data.conditions: {control: NAME}` passes it to the network as the keyword `control`,
`data.targets: {features: NAME}` to the objective. NAME is the name of a function in ARRAYS, or NAME:ARGUMENT for one
with an argument, e.g. vision:vit_small_patch14_dinov2.lvd142m@224.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from pixart.data.images import Record
from pixart.encoders.autoencoder import Autoencoder
from pixart.encoders.vision import load_patch_features
from pixart.registry import Registry
from pixart.seeds import Draw


@dataclass(frozen=True)
class ArrayContext:
    """What a function that makes arrays can use."""

    autoencoder: Autoencoder
    device: torch.device


# pixels (B, 3, H, W) in [-1, 1], their records, whether they are mirrored → (B, …), the same shape for a whole bucket
Maker = Callable[[Tensor, Sequence[Record], bool], Tensor]
# each entry: a function of the context, and of the text after the colon if its name has one
ARRAYS: Registry[Callable[..., Maker]] = Registry("data.conditions and data.targets")


def open_array(name: str, context: ArrayContext) -> Maker:
    """The function that makes the array NAME or NAME:ARGUMENT.

    Raises:
        InputError: there is none of that name, or it refuses its argument.
    """
    kind, colon, argument = name.partition(":")
    return ARRAYS[kind](context, argument) if colon else ARRAYS[kind](context)


@ARRAYS.register("vision")
def vision(context: ArrayContext, model: str = "") -> Maker:
    """Patch features (B, h, w, D), bf16, of the vision model of that name, see `load_patch_features`."""
    features = load_patch_features(model, context.device, "vision:")
    return lambda pixels, records, mirrored: features(pixels).to(pixels.device, torch.bfloat16)


@dataclass(frozen=True)
class Extras:
    """What samples have besides latents and captions: random numbers by name, and arrays."""

    conditions: Mapping[str, Draw | str] = field(default_factory=dict)  # keyword of the network → draw or array
    targets: Mapping[str, str] = field(default_factory=dict)  # name for the objective → array
    draws: Mapping[str, Draw] = field(default_factory=dict)  # for the objective

    @property
    def arrays(self) -> list[str]:
        """The arrays in use, without duplicates."""
        named = [name for name in self.conditions.values() if isinstance(name, str)]
        return sorted({*named, *self.targets.values()})
