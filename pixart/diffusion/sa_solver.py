"""SA-Solver: a stochastic Adams predictor and corrector of order 2 (arXiv 2309.05019), as PixArt's authors run it."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from pixart.diffusion.guidance import Denoise
from pixart.diffusion.samplers import Callback, draw_noise, report
from pixart.diffusion.schedule import TRAIN_STEPS, DiscreteSchedule
from pixart.errors import InputError

STOCHASTIC = (0.2, 0.8)  # noise is added on the way to these fractions of the process, ends included


def sa_solver(
    denoise: Denoise,
    x: Tensor,
    schedule: DiscreteSchedule,
    times: Sequence[float],
    generators: Sequence[torch.Generator] | None = None,
    *,
    tau: float = 1.0,
    noises: Sequence[Tensor] | None = None,
    callback: Callback | None = None,
) -> Tensor:
    """Predict, evaluate, correct, over falling times, fractional allowed, and to time 0; one call of `denoise` a step.

    The last step is of order 1, adds no noise and is not corrected.

    Args:
        tau: how much noise is added inside `STOCHASTIC`; 0 is an ODE solver and needs no generators.
        noises: what to add, one (B, C, H, W) a step, instead of the generators' draws.
    """
    if tau and generators is None and noises is None:
        raise InputError("sa_solver: tau > 0 adds noise and needs a generator per image")
    steps, times = len(times), [*times, 0.0]
    alphas, sigmas = zip(*(schedule.alpha_sigma(t) for t in times), strict=True)
    lambdas = [math.log(a / s) for a, s in zip(alphas, sigmas, strict=True)]  # half the log signal-to-noise ratio
    x0, before, h = denoise(x, times[0]).x0, None, 0.0  # predictions at this step's start and the last one's
    for i in range(steps):
        last = i + 1 == steps
        noisy = STOCHASTIC[0] <= (times[i + 1] + 1) / TRAIN_STEPS <= STOCHASTIC[1] and not last
        strength = tau**2 if noisy else 0.0
        h, h_before = lambdas[i + 1] - lambdas[i], h
        # the solution for a constant x0 (proposition 4.2), to which the orders add a slope in λ: the exact integral
        # of a slope is (1 + τ²)·h²/2 up to O(h³), and the authors take just that
        base = math.exp(-strength * h) * sigmas[i + 1] / sigmas[i] * x
        base = base - alphas[i + 1] * math.expm1(-(1 + strength) * h) * x0
        if strength:
            noise = draw_noise(generators, x.shape[1:], x.device) if noises is None else noises[i]
            base = base + sigmas[i + 1] * math.sqrt(-math.expm1(-2 * strength * h)) * noise
        weight = alphas[i + 1] * (1 + strength) * h / 2
        x = base if before is None or last else base + weight * h / h_before * (x0 - before)
        if not last:
            before, x0 = x0, denoise(x, times[i + 1]).x0
            x = base + weight * (x0 - before)
        x = report(callback, i, x, x0)
    return x
