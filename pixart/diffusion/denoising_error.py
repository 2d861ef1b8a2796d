"""How well a network denoises, in a measure that does not depend on how it was trained."""

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from pixart.diffusion.guidance import make_denoise
from pixart.diffusion.losses import per_picture
from pixart.diffusion.schedule import DiffusionConfig, Schedule

RATIOS = (0.25, 1.0, 4.0, 16.0)  # of noise to signal, σ / α


def denoising_errors(
    network: Callable[[Tensor, Tensor], Tensor], schedule: Schedule, config: DiffusionConfig, x0: Tensor, noise: Tensor
) -> Tensor:
    """Squared errors of the clean pictures that `network(x, t)` implies, each times 1 + 1/ratio², at every ratio.

    That is EDM's weight for data of variance 1 (arXiv 2206.00364, table 1), of which a denoiser that knows no more than
    this variance has the error 1 at every ratio. Networks of any prediction, schedule, weighting or distribution of
    times can be compared by it, which their losses cannot.

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
        rows.append((1 + ratio**-2) * per_picture((found - x0.float()) ** 2))
    return torch.stack(rows)


def mean_error(errors: Iterable[float]) -> float:
    """The one number of errors at several ratios: their geometric mean, so that an improvement by a factor counts the
    same at every ratio. A plain mean would follow the largest alone."""
    errors = list(errors)
    if any(map(math.isnan, errors)):
        return math.nan
    if min(errors) <= 0:
        return 0.0
    return math.exp(sum(map(math.log, errors)) / len(errors))
