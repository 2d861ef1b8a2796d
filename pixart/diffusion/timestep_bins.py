"""Loss by quarter of the training times: the mean over all times hides whether noise or detail is what improves."""

import torch
from torch import Tensor


def sum_by_quarter(losses: Tensor, time: Tensor, weight: Tensor) -> Tensor:
    """Weighted sums of losses, and sums of weights, in each quarter of the times → fp32 (2, 4), on the device.

    Args:
        losses: (B,) per picture.
        time: (B,) the uniform numbers in [0, 1) that the times were made of; a quarter of the pictures falls into each
            quarter of them, whatever the distribution of times. The first is the least noisy.
        weight: (B,) 1, or 0 for a picture that does not count, whose loss may be anything.
    """
    # no one_hot: it looks at its values, and so waits for the device
    quarter = (time * 4).long().clamp(0, 3)
    one_hot = (quarter[:, None] == torch.arange(4, device=time.device)) & (weight > 0)[:, None]  # (B, 4)
    weighted = torch.stack([losses.detach().float() * weight, weight.float()])  # (2, B)
    # where, not a product: a loss that is not finite stays in its quarter
    return torch.where(one_hot, weighted[:, :, None], 0.0).sum(1)


def quarter_means(sums: Tensor, prefix: str) -> dict[str, float]:
    """`prefix`_q1 … _q4 of `sum_by_quarter`'s sums; a quarter without pictures is left out."""
    values, counts = sums.tolist()
    return {f"{prefix}_q{i + 1}": values[i] / counts[i] for i in range(4) if counts[i]}
