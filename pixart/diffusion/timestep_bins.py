"""Loss in four timestep bins; the mean over all times hides at which noise level it improves."""

import torch
from torch import Tensor


def sum_by_bin(losses: Tensor, time: Tensor, weight: Tensor) -> Tensor:
    """Weighted sums of losses, and sums of weights, in each of four timestep bins → fp32 (2, 4) on the device.

    Args:
        losses: (B,) one per image.
        time: (B,) the uniform numbers in [0, 1) from which the times were computed. Bins are quarters of this range,
            so each holds a quarter of the images for any distribution of times; the first has the least noise.
        weight: (B,) 1, or 0 for an image that does not count, whose loss may be any value.
    """
    # not F.one_hot, which reads its values and so synchronises the device
    bins = (time * 4).long().clamp(0, 3)
    one_hot = (bins[:, None] == torch.arange(4, device=time.device)) & (weight > 0)[:, None]  # (B, 4)
    weighted = torch.stack([losses.detach().float() * weight, weight.float()])  # (2, B)
    # torch.where, not a product: a non-finite loss must not reach the other bins
    return torch.where(one_hot, weighted[:, :, None], 0.0).sum(1)


def bin_means(sums: Tensor, prefix: str) -> dict[str, float]:
    """Mean loss per bin, as `prefix`_q1 … `prefix`_q4, from the sums of `sum_by_bin`; empty bins are left out."""
    values, counts = sums.tolist()
    return {f"{prefix}_q{i + 1}": values[i] / counts[i] for i in range(4) if counts[i]}
