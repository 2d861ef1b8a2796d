"""Put adapters' changes into a network's weights, with a strength each, and take them out again, bit for bit."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pixart.adapters.base import other_base
from pixart.adapters.changes import Change, LowRank
from pixart.adapters.lora_files import LoraFile
from pixart.adapters.lora_names import Place
from pixart.errors import InputError, did_you_mean
from pixart.model.pixart import PixArt


@dataclass
class _Loaded:
    file: LoraFile
    strength: float


class Loras:
    """The adapters that are merged into one network: W = W₀ + Σ strength · ΔW, computed in fp32.

    The network costs nothing more to call. Weights that are changed are kept as they were, on the same device. They are
    changed in place, since a CUDA graph reads them where they were when it was recorded.
    """

    def __init__(self, network: PixArt):
        self.network = network
        self.loaded: dict[str, _Loaded] = {}
        self._before: dict[str, Tensor] = {}

    def load(self, name: str, file: LoraFile, strength: float = 1.0) -> None:
        """Add an adapter.

        Warns:
            UserWarning: its file says that it was trained on other weights than the network's.

        Raises:
            InputError: the name is taken, or the adapter does not fit the network.
        """
        if name in self.loaded:
            raise InputError(f"lora: '{name}' is loaded already; give this one another name, or unload that one first")
        self.check(name, file)
        if (doubt := self.doubt(name, file)) is not None:
            warnings.warn(doubt, stacklevel=2)
        self.loaded[name] = _Loaded(file, _strength(strength))
        self._refresh(file)

    def doubt(self, name: str, file: LoraFile) -> str | None:
        """What `load` would warn of: that the adapter was trained on other weights than the network's. None if not."""
        if file.base_weights is None or not (found := other_base(file.base_weights, self.network, self._before)):
            return None
        return (
            f"lora '{name}': it was trained on {file.base or 'another base'}, whose weights are not this network's "
            f"({file.base_weights} there, {found} here); images may not show what it was trained for"
        )

    def check(self, name: str, file: LoraFile) -> None:
        """Only say whether an adapter could be loaded.

        Raises:
            InputError: it does not fit the network.
        """
        parameters = dict(self.network.named_parameters())
        for place, change in file.changes.items():
            self._check(place, change, parameters.get(place.name), name)

    def unload(self, name: str | None = None) -> None:
        """Take out one adapter, or all.

        Raises:
            InputError: none of that name is loaded.
        """
        for each in list(self.loaded) if name is None else [name]:
            self._known(each)
            self._refresh(self.loaded.pop(each).file)

    def set_strength(self, name: str, strength: float) -> None:
        """Change how strongly an adapter acts.

        Raises:
            InputError: none of that name is loaded, or the strength is not finite.
        """
        self._known(name)
        self.loaded[name].strength = _strength(strength)
        self._refresh(self.loaded[name].file)

    def _known(self, name: str) -> None:
        if name not in self.loaded:
            there = ", ".join(self.loaded) or "none"
            raise InputError(f"lora: no '{name}' is loaded{did_you_mean(name, self.loaded)} (loaded: {there})")

    @staticmethod
    def _check(place: Place, change: Change, weight: Tensor | None, name: str) -> None:
        if weight is None:
            raise InputError(
                f"lora '{name}': it changes {place.name}, which this network does not have; is it for a deeper one?"
            )
        if not weight.is_floating_point():
            raise InputError(f"lora '{name}': {place.name} is quantised; load the network in floating point")
        rows = (len(weight) // place.parts, *weight.shape[1:])
        if (found := change.shape) not in (rows, (rows[0], weight[0].numel())):
            raise InputError(
                f"lora '{name}': it changes {place.name} by a matrix of {' × '.join(map(str, found))}, the network's "
                f"is {' × '.join(map(str, rows))}: it was trained on a network of another width"
            )

    @torch.no_grad()
    def _refresh(self, file: LoraFile) -> None:
        """Compute the weights that `file` changes anew from those that were there before any adapter."""
        parameters = dict(self.network.named_parameters())
        acting: dict[str, list[tuple[float, Place, Change]]] = {place.name: [] for place in file.changes}
        for each in self.loaded.values():
            for place, change in each.file.changes.items():
                if place.name in acting:
                    acting[place.name].append((each.strength, place, change))
        # for the sums of all weights that are not fp32: new memory for each would take longer than the sum
        sizes = [w.numel() for w in map(parameters.__getitem__, acting) if not _takes_sums(w)]
        room = torch.empty(max(sizes, default=0), device=next(iter(parameters.values())).device)
        for tensor, changes in acting.items():
            weight = parameters[tensor]
            if not changes:
                weight.copy_(self._before.pop(tensor))
                continue
            fresh = tensor not in self._before
            if fresh:
                self._before[tensor] = weight.detach().clone()
            before = self._before[tensor].to(weight.device)
            own = _takes_sums(weight)
            whole = weight.detach() if own else room[: weight.numel()].view(weight.shape)
            if not (own and fresh):
                whole.copy_(before)
            _add(whole, before, changes)
            if not own:
                weight.copy_(whole)


def _takes_sums(weight: Tensor) -> bool:
    """Whether changes can be added to the weight itself: in fp32, and by rows in place."""
    return weight.dtype == torch.float32 and weight.is_contiguous()


def _add(whole: Tensor, before: Tensor, changes: Sequence[tuple[float, Place, Change]]) -> None:
    """Add changes, each by its strength, to a weight in fp32, which is `before` still."""
    for strength, place, change in changes:
        rows = slice(place.part * len(whole) // place.parts, (place.part + 1) * len(whole) // place.parts)
        if isinstance(change, LowRank) and change.magnitude is None:
            # added while it is multiplied: reading and writing the change would take longer than the product
            part = whole[rows].flatten(1)
            down, up = change.down.flatten(1).to(part), change.up.flatten(1).to(part)
            part.addmm_(up, down, alpha=strength * change.scale)
        else:
            whole[rows] += strength * change.delta(before[rows].float())


def _strength(value: float) -> float:
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not abs(value) < float("inf"):
        raise InputError(f"lora: strength: got {value}, expected a number")
    return float(value)


def merge(network: PixArt, file: LoraFile, strength: float = 1.0) -> None:
    """Add an adapter to a network's weights for good.

    Raises:
        InputError: it does not fit the network.
    """
    Loras(network).load("lora", file, strength)
