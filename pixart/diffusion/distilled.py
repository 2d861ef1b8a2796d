"""Samplers for models that were distilled to a few steps, with guidance built in: LCM and DMD."""

from collections.abc import Sequence

import torch
from torch import Tensor

from pixart.diffusion.guidance import Denoise
from pixart.diffusion.samplers import Callback, draw_noise, report
from pixart.diffusion.schedule import DiscreteSchedule
from pixart.errors import InputError

LCM_GRID = 50  # an LCM is distilled at this many times: 19, 39 … 999
LCM_SIGMA_DATA, LCM_TIME_SCALE = 0.5, 10.0
DMD_TIME = 400.0  # the only time at which PixArt's DMD was distilled


def lcm_times(schedule: DiscreteSchedule, steps: int) -> list[float]:
    """The decreasing times of a multistep LCM, evenly spaced on the grid at which it was distilled."""
    if not 1 <= steps <= LCM_GRID:
        raise InputError(f"lcm: got {steps} steps, expected 1 to {LCM_GRID}, the times it was distilled at")
    stride = len(schedule) // LCM_GRID
    return [float(stride * (LCM_GRID - i * LCM_GRID // steps) - 1) for i in range(steps)]


def lcm(
    denoise: Denoise,
    x: Tensor,
    schedule: DiscreteSchedule,
    times: Sequence[float],
    generators: Sequence[torch.Generator],
    *,
    callback: Callback | None = None,
) -> Tensor:
    """Multistep latent consistency sampling (arXiv 2310.04378, algorithm 3; PixArt-δ, arXiv 2401.05252)."""
    for i, t in enumerate(times):
        scaled = LCM_TIME_SCALE * t / LCM_SIGMA_DATA
        skip, out = 1 / (scaled**2 + 1), scaled / (scaled**2 + 1) ** 0.5  # skip → 1, out → 0 at t = 0
        x = x0 = skip * x + out * denoise(x, float(t)).x0
        if i + 1 < len(times):
            alpha, sigma = schedule.alpha_sigma(times[i + 1])
            x = alpha * x + sigma * draw_noise(generators, x.shape[1:], x.device)
        x = report(callback, i, x, x0)
    return x


def dmd(
    denoise: Denoise,
    x: Tensor,
    schedule: DiscreteSchedule,
    times: Sequence[float] = (DMD_TIME,),
    *,
    callback: Callback | None = None,
) -> Tensor:
    """Distribution matching distillation (arXiv 2311.18828): one call at times[0]; x is standard normal noise."""
    x0 = denoise(x, times[0]).x0
    return report(callback, 0, x0, x0)
