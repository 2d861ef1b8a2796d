"""What the machine does: FLOPs of a batch, the peak that they are a share of, memory."""

import time

import torch

from pixart.data.samples import Batch
from pixart.model.flops import training_flops
from pixart.model.pixart import PixArtConfig


def batch_flops(config: PixArtConfig, batch: Batch) -> int:
    """FLOPs that training the network on a batch needs, padding of captions included.

    By the convention of MFU (arXiv 2204.02311, appendix B): three forwards, whatever is computed twice to save memory
    or left out because it is frozen; text encoder and autoencoder are not counted.
    """
    count, _, height, width = batch.noise.shape
    return training_flops(config, height, width, batch.caption.shape[1], count)


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
