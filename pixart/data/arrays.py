"""Named arrays of images, for the network or the objective: control images, features of a vision model, and the like.

An array is made of an image's pixels, or of a file of its own that lies beside the image; a feature store holds it, so
that it is made once. `data.conditions: {control: NAME}` gives it to the network as the keyword `control`,
`data.targets: {features: NAME}` to the objective.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from pixart.data.images import Record
from pixart.encoders.autoencoder import Autoencoder
from pixart.registry import Registry
from pixart.seeds import Draw


@dataclass(frozen=True)
class ArrayContext:
    """What a maker of arrays may work with."""

    autoencoder: Autoencoder
    device: torch.device


# pixels (B, 3, H, W) in [-1, 1], their records, whether they are mirrored → (B, …), one shape for a bucket
Maker = Callable[[Tensor, Sequence[Record], bool], Tensor]
ARRAYS: Registry[Callable[[ArrayContext], Maker]] = Registry("data.conditions and data.targets")


@dataclass(frozen=True)
class Extras:
    """What samples have beside latents and captions: random numbers by name, and arrays."""

    conditions: Mapping[str, Draw | str] = field(default_factory=dict)  # keyword of the network → numbers, or an array
    targets: Mapping[str, str] = field(default_factory=dict)  # name for the objective → array
    draws: Mapping[str, Draw] = field(default_factory=dict)  # for the objective

    @property
    def arrays(self) -> list[str]:
        """The arrays that are asked for, each once."""
        named = [name for name in self.conditions.values() if isinstance(name, str)]
        return sorted({*named, *self.targets.values()})
