"""Devices that torch may use, and the memory that this process uses."""

import re
from pathlib import Path

import torch

from pixart.arguments import say
from pixart.errors import InputError


def check_device(device: torch.device | str) -> None:
    """Refuse a device that torch cannot use."""
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # AssertionError if torch was built without CUDA
        reason = str(error).split("\n")[0].rstrip(".")[:200]
        raise InputError(
            f"device {say(str(device))}: torch cannot use it ({reason}); expected cpu or a GPU that torch sees, e.g. "
            "cuda:0"
        ) from None


def resident(key: str) -> int | None:
    """Resident memory in bytes, now (VmRSS) or at its peak (VmHWM), mapped pages included; None if not on Linux.

    getrusage is not used because its peak includes that of the process from which this one was forked.
    """
    status = Path("/proc/self/status")
    if not status.exists():
        return None
    return int(re.search(rf"{key}:\s+(\d+)", status.read_text())[1]) * 1024
