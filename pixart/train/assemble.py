"""From a configuration and a network to the parts that a run trains."""

import torch

from pixart.adapters.lora import find_layers
from pixart.cpu import use_onednn
from pixart.diffusion.objective import Objective
from pixart.model.pixart import PixArt
from pixart.quantize import QUANTIZED, QuantizedLinear
from pixart.train.config import TrainConfig
from pixart.train.distributed import shard
from pixart.train.optimizer import freeze
from pixart.train.parts import Parts


def assemble(
    config: TrainConfig, network: PixArt, objective: Objective, *, onednn: bool = False, simulated: bool = False
) -> Parts:
    """The parts of a run around `network` and `objective`; sharded, if the configuration says so, and with what is not
    trained frozen.

    `onednn` makes both modules use oneDNN's matrix product on a CPU; `simulated` ones are neither compiled nor sharded.

    Raises:
        InputError: the adapter or `train.freeze` does not fit the network.
    """
    device = next(network.parameters()).device
    for module in (network, objective) if onednn else ():
        if all(parameter.dtype == torch.float32 for parameter in module.parameters()):  # oneDNN's product is for fp32
            use_onednn(module)
    parts = Parts.of(network, objective, config.adapter, config.seed, averaged=config.averaged)
    network.gradient_checkpointing = config.train.gradient_checkpointing
    network.checkpointing_every = config.train.checkpointing_every
    if config.train.compile and not simulated:
        network.compile_blocks()
    if config.adapter is None:
        freeze(network, config.train.freeze)
    # accelerate's own FSDP needs a GPU; its prepare_model takes no sharded model
    if config.train.parallel == "fsdp" and not simulated:
        _shard(parts, device, adapted=config.adapter is not None)
    return parts


def place(network: PixArt, config: TrainConfig, device: torch.device | None = None) -> PixArt:
    """A network in the precision that an adapter's base has, then moved to `device`."""
    kind = "float32" if config.adapter is None else config.adapter.base_dtype
    if kind in QUANTIZED:
        _quantize(network, kind, device)
    elif kind != "float32":
        _cast(network, getattr(torch, kind))
    return network if device is None else network.to(device)


def _quantize(network: PixArt, kind: str, device: torch.device | None) -> None:
    """Replace the linear layers of attention and MLP, one at a time, so that the device never holds all weights."""
    for name in list(find_layers(network, "attention+mlp")):
        layer = network.get_submodule(name)
        parent, _, own = name.rpartition(".")
        small = QuantizedLinear(layer if device is None else layer.to(device), kind)
        setattr(network.get_submodule(parent), own, small)


def _cast(network: PixArt, dtype: torch.dtype) -> None:
    """Change the precision of all floating-point tensors; unlike `Module.to` it works on simulated ones, too."""
    for module in network.modules():
        for name, parameter in module.named_parameters(recurse=False):
            setattr(module, name, torch.nn.Parameter(parameter.detach().to(dtype), requires_grad=False))
        for name, buffer in module.named_buffers(recurse=False):
            if buffer.is_floating_point():
                setattr(module, name, buffer.to(dtype))


def _shard(parts: Parts, device: torch.device, *, adapted: bool) -> None:
    """Shard what is large. Of an adapted network that is the frozen base, once for the network and once for its
    average; what is trained stays whole in every process, whose gradients the training step averages."""
    trained, frozen = [*parts.trained.values()], [*parts.averages.values(), *parts.kept.values()]
    if adapted:
        trained, frozen = [parts.network], [parts.average, *parts.kept.values()]
    for module in trained:
        shard(module, device)
    for module in frozen:
        shard(module, device, trained=False)
    if not adapted:
        shard(parts.training, device)
