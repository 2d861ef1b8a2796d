"""Devices that torch may use."""

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
