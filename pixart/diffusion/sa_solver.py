"""SA-Solver: a stochastic Adams predictor and corrector of order 2 (arXiv 2309.05019), as PixArt's authors run it."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from pixart.diffusion.guidance import Denoise
from pixart.diffusion.samplers import Callback, draw_noise, report
from pixart.diffusion.schedule import TRAIN_STEPS, DiscreteSchedule
from pixart.errors import InputError

STOCHASTIC = (0.2, 0.8)  # noise is added in steps that end within these fractions of the process, inclusive


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
    """Predict, evaluate and correct at decreasing times (fractional ones allowed), ending at time 0.

    One call of `denoise` per step. The last step has order 1, adds no noise and is not corrected.

    Args:
        x: (B, C, H, W) at times[0].
        tau: amount of noise added within `STOCHASTIC`; 0 gives an ODE solver, which needs no generators.
        noises: the noise to add, one (B, C, H, W) per step, instead of drawing it from the generators.

    Raises:
        InputError: `tau` is above 0 but there are neither generators nor noises.
    """
    if tau and generators is None and noises is None:
        raise InputError("sa_solver: tau > 0 adds noise and needs a generator per image")
    steps, times = len(times), [*times, 0.0]
    alphas, sigmas = zip(*(schedule.alpha_sigma(t) for t in times), strict=True)
    lambdas = [math.log(a / s) for a, s in zip(alphas, sigmas, strict=True)]  # half the log signal-to-noise ratio
    x0, before, h = denoise(x, times[0]).x0, None, 0.0  # predictions at the start of this step and of the previous one
    for i in range(steps):
        last = i + 1 == steps
        noisy = STOCHASTIC[0] <= (times[i + 1] + 1) / TRAIN_STEPS <= STOCHASTIC[1] and not last
        strength = tau**2 if noisy else 0.0
        h, h_before = lambdas[i + 1] - lambdas[i], h
        # the solution for a constant x0 (proposition 4.2); order 2 adds a linear term in λ, whose integral is
        # (1 + τ²)·h²/2 + O(h³), of which the authors keep the leading term
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
