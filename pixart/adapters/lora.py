"""Low-rank adaptation: LoRA (arXiv 2106.09685), rsLoRA (arXiv 2312.03732), DoRA (arXiv 2402.09353).

An adapted layer computes W x + s · B A x, where A is (r, in) and B (out, r) starts at zero. The scale s is α/r, or α/√r
with `rslora`. With `dora` the rows of W + s · B A are rescaled to learnt lengths. Names and settings are PEFT's.
"""

import fnmatch
import math
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pixart.adapters.adapter import ADAPTERS, Adapter
from pixart.errors import InputError
from pixart.model.embed import PatchProjection
from pixart.model.pixart import PixArt

ATTENTION = ("blocks.*.attn.qkv", "blocks.*.attn.proj", "blocks.*.cross_attn.*")
# as `targets` names them: patterns of modules
TARGETS = {
    "attention": ATTENTION,
    "attention+mlp": (*ATTENTION, "blocks.*.mlp.*"),
    # what the authors' scripts adapt
    "all": ("*",),
}


class LoraLayer(nn.Module):
    """The addition to one layer, which it finds by a hook: the layer keeps its class, name and weight."""

    def __init__(self, layer: nn.Linear | PatchProjection, rank: int, scale: float, *, dora: bool, dropout: float):
        super().__init__()
        linear = isinstance(layer, nn.Linear)  # whose weight may be quantised
        rows, width = (layer.out_features, layer.in_features) if linear else layer.weight.flatten(1).shape
        self.scale, self.dropout, self.layer = scale, dropout, (layer,)  # in a tuple: no child of this module
        self.down = nn.Parameter(torch.empty(rank, width))
        self.up = nn.Parameter(torch.zeros(rows, rank))
        self.magnitude = nn.Parameter(torch.empty(rows)) if dora else None
        layer.register_forward_hook(self.add)

    @torch.no_grad()
    def init_weights(self, generators) -> None:
        bound = 1 / math.sqrt(self.down.shape[1])  # Kaiming's uniform with a = √5, as PEFT starts
        self.down.uniform_(-bound, bound, generator=generators("down"))
        self.up.zero_()
        weight = self.layer[0].weight
        if self.magnitude is not None and not weight.is_meta:  # where only the settings are checked
            self.magnitude.copy_(weight.flatten(1).float().norm(dim=1))

    def add(self, layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        """The layer's output with the adapter."""
        x = layer.patches(inputs[0]) if isinstance(layer, PatchProjection) else inputs[0]
        dropped = F.dropout(x, self.dropout, self.training)
        # scaled where it is narrow: of the whole width this took 3 % of a training step
        added = F.linear(F.linear(dropped, self.down.to(x.dtype)) * self.scale, self.up.to(x.dtype))
        if self.magnitude is None:
            return output + added
        whole = layer.weight.flatten(1).float() + self.scale * self.up.float() @ self.down.float()
        # the length is a constant in the gradient, as in the paper's section 4.3
        ratio = (self.magnitude / whole.norm(dim=1).detach()).to(x.dtype)
        bias = 0 if layer.bias is None else layer.bias.to(x.dtype)
        return output + (ratio - 1) * (output - bias) + ratio * added


@ADAPTERS.register("lora")
class Lora(Adapter):
    """Low-rank additions to linear layers and, if `targets` names it, to the patch convolution.

    Args:
        rank: r.
        alpha: α; by default r.
        targets: "attention", "attention+mlp", "all", or patterns of module names, as blocks.*.attn.qkv.
        dora: learn the lengths of the rows, too.
        rslora: scale by α/√r instead of α/r.
        dropout: probability with which an input of the adapter is dropped in training.

    Raises:
        InputError: a number is out of range, or a pattern matches no layer.
    """

    def __init__(
        self,
        network: PixArt,
        *,
        rank: int = 16,
        alpha: float | None = None,
        targets: str | Iterable[str] = "attention+mlp",
        dora: bool = False,
        rslora: bool = False,
        dropout: float = 0.0,
    ):
        super().__init__(network)
        if not isinstance(rank, int) or not 1 <= rank <= 4096:
            raise InputError(f"adapter lora: rank: got {rank}, expected a whole number from 1 to 4096")
        alpha = rank if alpha is None else alpha
        if not 0 < alpha < math.inf:
            raise InputError(f"adapter lora: alpha: got {alpha}, expected a number above 0")
        if not 0 <= dropout < 1:
            raise InputError(f"adapter lora: dropout: got {dropout}, expected at least 0 and below 1")
        scale = scale_of(alpha, rank, rslora)
        self.layers = nn.ModuleDict()
        for name, layer in find_layers(network, targets).items():
            self.layers[to_key(name)] = LoraLayer(layer, rank, scale, dora=dora, dropout=dropout)


def scale_of(alpha: float, rank: int, rslora: bool) -> float:
    """The factor of B A x: α/r, or α/√r if it is rank-stabilised."""
    return alpha / (math.sqrt(rank) if rslora else rank)


def to_key(module: str) -> str:
    """A module's name as a key of `Lora.layers`, which may have no dots; `to_module` is the inverse."""
    return module.replace(".", "-")


def to_module(key: str) -> str:
    return key.replace("-", ".")


def find_layers(network: PixArt, targets: str | Iterable[str]) -> dict[str, nn.Module]:
    """The layers that `targets` means, by name.

    Raises:
        InputError: a pattern matches no linear layer and no convolution.
    """
    patterns = TARGETS.get(targets, (targets,)) if isinstance(targets, str) else tuple(targets)
    layers = {
        name: module for name, module in network.named_modules() if isinstance(module, (nn.Linear, PatchProjection))
    }
    found: dict[str, nn.Module] = {}
    for pattern in patterns:
        matched = fnmatch.filter(layers, pattern)
        if not matched:
            raise InputError(
                f"adapter lora: targets: '{pattern}' matches no layer; expected {', '.join(TARGETS)} or patterns of "
                f"names as {', '.join(list(layers)[2:6])}"
            )
        found |= {name: layers[name] for name in matched}
    return {name: layer for name, layer in layers.items() if name in found}  # in the network's order
