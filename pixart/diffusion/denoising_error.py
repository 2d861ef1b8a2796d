"""A denoising error that does not depend on how the network was trained, so that networks can be compared by it."""

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from pixart.diffusion.guidance import make_denoise
from pixart.diffusion.losses import per_image
from pixart.diffusion.schedule import DiffusionConfig, Schedule

RATIOS = (0.25, 1.0, 4.0, 16.0)  # noise-to-signal ratios σ / α at which the error is measured


def denoising_errors(
    network: Callable[[Tensor, Tensor], Tensor], schedule: Schedule, config: DiffusionConfig, x0: Tensor, noise: Tensor
) -> Tensor:
    """Mean squared error of the clean image that `network(x, t)` implies, times 1 + 1/ratio², at each of `RATIOS`.

    The weight is EDM's for data of variance 1 (arXiv 2206.00364, table 1). With it, the best linear denoiser of white
    noise of variance 1 has an error of exactly 1 at every ratio. Unlike the training loss, the error can be compared
    between networks of different predictions, schedules, weightings and time distributions.

    Args:
        x0, noise: (B, C, H, W), scaled latents and standard normal noise.

    Returns:
        fp32 (ratios, B).
    """
    denoise = make_denoise(network, schedule, config)
    rows = []
    for ratio in RATIOS:
        t = schedule.time_of(ratio)
        alpha, sigma = schedule.alpha_sigma(t)
        found = denoise(alpha * x0.float() + sigma * noise, t).x0
        rows.append((1 + ratio**-2) * per_image((found - x0.float()) ** 2))
    return torch.stack(rows)


def mean_error(errors: Iterable[float]) -> float:
    """The geometric mean of the errors at several ratios; NaN if one is NaN, 0 if one is 0.

    An improvement by a factor counts the same at every ratio; an arithmetic mean would follow the largest error alone.
    """
    errors = list(errors)
    if any(map(math.isnan, errors)):
        return math.nan
    if min(errors) <= 0:
        return 0.0
    return math.exp(sum(map(math.log, errors)) / len(errors))
