"""Throughput: FLOPs of the networks' calls, the peak FLOP/s of the device, memory."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from pixart.model.flops import forward_flops
from pixart.model.pixart import CaptionContext, PixArt


class CallCounter:
    """Counts the FLOPs of all calls of all PixArts within a module. Which networks are frozen is read when it is made.

    By the convention of MFU (arXiv 2204.02311, appendix B), a call counts as three forwards if the network is trained,
    whether or not activations are recomputed or some weights are frozen; as two if only its input needs a gradient; as
    one without gradients. Padding of captions is counted; the text encoder and the autoencoder are not.
    """

    def __init__(self, module: nn.Module, *trained: PixArt):
        """`trained` are networks that count as trained even if their own weights are frozen."""
        self.flops, self._active = 0, False
        self._trained: dict[PixArt, bool] = {}
        for network in module.modules():
            if isinstance(network, PixArt):
                self._trained[network] = network in trained or any(p.requires_grad for p in network.parameters())
                network.register_forward_pre_hook(self._count, with_kwargs=True)

    @contextmanager
    def counting(self) -> Iterator[None]:
        """A context in which calls are counted; calls outside it, e.g. of a validation, are not."""
        self._active = True
        try:
            yield
        finally:
            self._active = False

    def take(self) -> int:
        """FLOPs since `take` was last called."""
        flops, self.flops = self.flops, 0
        return flops

    def _count(self, network: PixArt, arguments: tuple, keywords: dict) -> None:
        if not self._active:
            return
        given = {**dict(zip(("x", "t", "caption"), arguments, strict=False)), **keywords}
        x, caption = given["x"], given["caption"]
        length = caption.blocks[0][0].shape[2] if isinstance(caption, CaptionContext) else caption.shape[1]
        more = {
            name: tuple(given[name].shape[1:]) for name in network.conditions if isinstance(given.get(name), Tensor)
        }
        forward = forward_flops(network.config, *x.shape[2:], length, len(x), more)
        through = 3 if self._trained[network] else 2 if x.requires_grad else 1
        self.flops += forward * (through if torch.is_grad_enabled() else 1)


def measure_peak(device: torch.device, dtype: torch.dtype) -> float:
    """TFLOP/s of the fastest of ten large square matrix products on `device`; takes less than a second."""
    side = 8192 if device.type == "cuda" else 1024
    generator = torch.Generator(device).manual_seed(0)  # leaves training's own generator alone
    left, right = (torch.randn(side, side, device=device, dtype=dtype, generator=generator) for _ in range(2))
    best = float("inf")
    for _ in range(10):
        _wait_for(device)
        start = time.perf_counter()
        left @ right
        _wait_for(device)
        best = min(best, time.perf_counter() - start)
    return 2 * side**3 / best / 1e12


def memory_gb(device: torch.device) -> float:
    """GiB: on CUDA the most memory that tensors have taken so far, elsewhere the process's current memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    import psutil  # accelerate brings it

    return psutil.Process().memory_info().rss / 2**30


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
