"""The contract of an adapter, and adapters by name."""

import copy
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, TypeVar

from torch import nn

from pixart.errors import InputError
from pixart.model.initialize import initialize
from pixart.model.pixart import PixArt
from pixart.registry import Registry
from pixart.seeds import derive_seed

Module = TypeVar("Module", bound=nn.Module)


class Adapter(nn.Module):
    """Modules that change a network in place, by hooks or by taking a layer's place.

    Its own parameters, and they alone, are trained, averaged and saved; the network keeps its names and weights. It
    must start without an effect: the network with a new adapter is the network. Options of its own are keyword
    arguments of its constructor, filled from `adapter.options`.
    """

    def __init__(self, network: PixArt):
        super().__init__()


ADAPTERS: Registry[type[Adapter]] = Registry("adapter.kind")


@dataclass(frozen=True)
class AdapterConfig:
    """Which adapter a network has. Options may be written beside `kind`, as {kind: lora, rank: 16}."""

    rest: ClassVar[str] = "options"  # the field that takes all other keys

    kind: str  # a key of ADAPTERS
    options: dict[str, Any] = field(default_factory=dict)  # keyword arguments of its constructor
    # of the frozen network's weights; bfloat16 halves their memory, and autocast to it computes the same products; int8
    # and nf4 (4 bits, needs the extra "quantize") quantise the linear layers of attention and MLP
    base_dtype: Literal["float32", "bfloat16", "int8", "nf4"] = "float32"


def adapt(network: PixArt, config: AdapterConfig, seed: int = 0) -> Adapter:
    """Freeze a network and put a new adapter on it, which starts by `seed` and the names of its tensors.

    Raises:
        InputError: there is none of that name, it does not take an option, or it has nothing to train.
    """
    kind = ADAPTERS[config.kind]
    network.requires_grad_(False)
    try:
        adapter = kind(network, **config.options)
    except TypeError as error:
        raise InputError(f"adapter '{config.kind}' refuses its options {config.options}: {error}") from None
    if not any(True for _ in adapter.parameters()):
        raise InputError(f"adapter '{config.kind}' with {config.options}: it has no parameter, so nothing would train")
    initialize(adapter, derive_seed(seed, "adapter"))
    network.adapted = config.kind  # its own tensors are no longer all of it, see `pixart.checkpoint.save`
    device = next(network.parameters()).device
    return adapter if all(parameter.device == device for parameter in adapter.parameters()) else adapter.to(device)


def share(module: Module) -> Module:
    """A second module around the same parameters and buffers, in evaluation mode; an adapter may change it alone."""
    tensors = [*module.parameters(), *module.buffers()]
    return copy.deepcopy(module, {id(tensor): tensor for tensor in tensors}).eval()
