"""What the machine does: FLOPs of the networks' calls, the peak that they are a share of, memory."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from pixart.model.flops import forward_flops
from pixart.model.pixart import CaptionContext, PixArt


class CallCounter:
    """FLOPs of all calls of all PixArts within a module, as they are frozen when it is made.

    By the convention of MFU (arXiv 2204.02311, appendix B): three forwards where a call is trained through, whatever
    is computed twice to save memory or left out because it is frozen; two where only its input needs a gradient; one
    without gradients. Padding of captions is counted, text encoder and autoencoder are not.
    """

    def __init__(self, module: nn.Module, *trained: PixArt):
        """`trained` are networks that count as trained through although their own weights are frozen."""
        self.flops, self._active = 0, False
        self._trained: dict[PixArt, bool] = {}
        for network in module.modules():
            if isinstance(network, PixArt):
                self._trained[network] = network in trained or any(p.requires_grad for p in network.parameters())
                network.register_forward_pre_hook(self._count, with_kwargs=True)

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Calls within are counted, others, as of a validation, are not."""
        self._active = True
        try:
            yield
        finally:
            self._active = False

    def take(self) -> int:
        """FLOPs since the last call of this."""
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
    """TFLOP/s of the fastest of ten products of large square matrices on `device`; takes less than a second."""
    side = 8192 if device.type == "cuda" else 1024
    left, right = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    best = float("inf")
    for _ in range(10):
        _wait_for(device)
        start = time.perf_counter()
        left @ right
        _wait_for(device)
        best = min(best, time.perf_counter() - start)
    return 2 * side**3 / best / 1e12


def memory_gb(device: torch.device) -> float:
    """GiB: on CUDA the most that tensors have taken so far, elsewhere what the process holds now."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    import psutil  # accelerate brings it

    return psutil.Process().memory_info().rss / 2**30


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
