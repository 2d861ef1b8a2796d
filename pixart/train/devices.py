"""Peak rates of devices."""

from dataclasses import dataclass

import torch

from pixart.errors import InputError, did_you_mean
from pixart.train.throughput import measure_peak

HERE = "here"
DAY = 86_400  # seconds


@dataclass(frozen=True)
class Device:
    """A device's dense peak (no structured sparsity) in TFLOP/s, by the type of the matrix product, and its memory."""

    name: str
    tflops: dict[torch.dtype, float]
    gigabytes: float | None = None

    def peak(self, dtype: torch.dtype) -> float:
        """FLOP/s in this type. Raises InputError if the device has no units for it."""
        if dtype not in self.tflops:
            known = ", ".join(_short(kind) for kind in self.tflops)
            raise InputError(f"device {self.name}: no {_short(dtype)} units, only {known}; set train.mixed_precision")
        return self.tflops[dtype] * 1e12


def _device(name: str, half: float, single: float, gigabytes: float, *, bf16: bool = True) -> Device:
    types = {torch.float16: half, torch.float32: single} | ({torch.bfloat16: half} if bf16 else {})
    return Device(name, types, gigabytes)


# NVIDIA's data sheets of these products (the SXM version, if there is one); where a sheet lists the rate with sparsity,
# half of it. fp32 is without TF32, which torch leaves off. RTX 4090: the Ada white paper, with fp32 accumulation
DEVICES = {
    device.name: device
    for device in (
        _device("v100", 125, 15.7, 32, bf16=False),
        _device("a100", 312, 19.5, 80),
        _device("l40s", 362, 91.6, 48),
        _device("rtx4090", 165.2, 82.6, 24),
        _device("h100", 989, 67, 80),
        _device("h200", 989, 67, 141),
    )
}


def find_device(name: str, dtype: torch.dtype) -> Device:
    """A device of `DEVICES`, or for "here" this machine's, whose peak is that of a large matrix product.

    Raises:
        InputError: there is none of that name.
    """
    if name == HERE:
        cuda = torch.cuda.is_available()
        device = torch.device("cuda" if cuda else "cpu")
        memory = torch.cuda.get_device_properties(device).total_memory / 1e9 if cuda else None
        return Device(HERE, {dtype: measure_peak(device, dtype)}, memory)
    if name not in DEVICES:
        known = ", ".join([*DEVICES, HERE])
        raise InputError(f"device {name}: not known{did_you_mean(name, DEVICES)} (there are {known})")
    return DEVICES[name]


def check_utilisation(share: float) -> None:
    """Raises InputError if the share of a peak that model FLOPs reach (MFU, arXiv 2204.02311) is not in (0, 1]."""
    if not 0 < share <= 1:
        raise InputError(f"utilisation: got {share:g}, expected more than 0 and at most 1")


def _short(dtype: torch.dtype) -> str:
    return {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}[dtype]
