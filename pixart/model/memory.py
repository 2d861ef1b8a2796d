"""Memory of a computation, by simulation: the code itself runs on tensors without data, and every storage is counted.

torch's fake tensors have shapes, types and a device but no values, so the network, its backward pass and the optimizer
run as they are, and a variant needs no formula. Not seen: what a kernel takes inside itself (workspaces of matrix
products and attention) and what the allocator loses to fragmentation.
"""

import warnings
import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

CASTS = "autocast copies"  # of weights in the type of the matrix products


@contextmanager
def without_data() -> Iterator[None]:
    """A context in which new tensors have no data and operations compute nothing but shapes."""
    with warnings.catch_warnings(), FakeTensorMode(allow_non_fake_inputs=True):
        warnings.filterwarnings("ignore", "Accessing the data pointer of FakeTensor")  # by a deep copy, which is fine
        yield


def empty(module: nn.Module, device: str = "cpu") -> nn.Module:
    """A module on the meta device as one with tensors without data on `device`; call it in `without_data`."""
    return module.to_empty(device=device)


class MemoryTracker(TorchDispatchMode):
    """A context that counts the bytes of all living storages by kind, and keeps the counts of the moment with the most.

    A new storage is of the kind `now`, which the caller sets; a copy of a weight in another type is of kind `CASTS`.
    """

    def __init__(self, now: str = "activations"):
        super().__init__()
        self.now = now
        self.live: dict[str, int] = {}  # bytes by kind
        self.total = 0
        self.at_peak: dict[str, int] = {}
        self.peak = 0
        self._known: dict[int, tuple[str, int]] = {}  # storage → its kind and bytes
        self._weights: set[int] = set()  # storages whose copies are casts

    def hold(self, tensors: Iterable[Tensor], kind: str, *, weights: bool = False) -> None:
        """Count tensors that exist, or move them to another kind; `weights` are those that autocast copies."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            self._add(storage, kind)
            if weights:
                self._weights.add(storage._cdata)

    def restart_peak(self) -> None:
        self.peak, self.at_peak = self.total, dict(self.live)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None) -> Any:
        result = function(*args, **(kwargs or {}))
        if not isinstance(result, (Tensor, tuple, list)):
            return result
        cast = function is torch.ops.aten._to_copy.default and args[0].untyped_storage()._cdata in self._weights
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.untyped_storage()._cdata not in self._known:
                self._add(tensor.untyped_storage(), CASTS if cast else self.now)
        return result

    def _add(self, storage: torch.UntypedStorage, kind: str) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            before, _ = self._known[key]
            self.live[before] -= size
            self.total -= size
        else:
            weakref.finalize(storage, self._remove, key)
        self._known[key] = kind, size
        self.live[kind] = self.live.get(kind, 0) + size
        self.total += size
        if self.total > self.peak:
            self.peak, self.at_peak = self.total, dict(self.live)

    def _remove(self, key: int) -> None:
        kind, size = self._known.pop(key)
        self.live[kind] -= size
        self.total -= size
        self._weights.discard(key)
