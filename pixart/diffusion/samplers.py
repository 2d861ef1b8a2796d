"""Solvers: functions of `denoise`, x at the first time, and the times to visit; they return scaled latents.

Noise that a solver adds is drawn on the CPU from one generator per image, so that an image depends on its own seed and
not on the other images of its batch. Coefficients are Python floats, computed without synchronising the device.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor

from pixart.diffusion.guidance import Denoise
from pixart.diffusion.losses import interpolate_log_variance
from pixart.diffusion.schedule import TRAIN_STEPS, DiscreteSchedule, FlowSchedule
from pixart.errors import InputError

# called after each step with its number (from 0), the new x and the predicted x0; a returned tensor replaces x
Callback = Callable[[int, Tensor, Tensor], Tensor | None]


def draw_noise(generators: Sequence[torch.Generator], shape: Sequence[int], device=None) -> Tensor:
    """Standard normal noise, fp32 (B, *shape); row i is drawn from generator i."""
    noise = torch.stack([torch.randn(tuple(shape), generator=g, device="cpu") for g in generators])
    if device is not None and torch.device(device).type == "cuda":
        noise = noise.pin_memory()  # a copy from pageable memory would wait for all queued GPU work
    return noise.to(device, non_blocking=True)


def iddpm(
    denoise: Denoise,
    x: Tensor,
    schedule: DiscreteSchedule,
    times: Sequence[float],
    generators: Sequence[torch.Generator],
    *,
    clip_x0: bool = False,
    callback: Callback | None = None,
) -> Tensor:
    """Ancestral sampling on the chain of `times` (improved DDPM, arXiv 2102.09672), with the learned variance if any.

    x is (B, C, H, W) at times[0]; times are integers, decreasing. `clip_x0` clamps the predicted x0 to [-1, 1], for
    models of pixels; latents are not bounded.
    """
    chain = _chain(schedule, times)
    for i in reversed(range(len(chain))):
        noise = draw_noise(generators, x.shape[1:], x.device) if i else None
        x, x0 = iddpm_step(denoise, x, chain, i, noise, clip_x0=clip_x0)
        x = report(callback, len(chain) - 1 - i, x, x0)
    return x


def iddpm_step(
    denoise: Denoise, x: Tensor, chain: DiscreteSchedule, i: int, noise: Tensor | None, *, clip_x0: bool = False
) -> tuple[Tensor, Tensor]:
    """x at step i of a chain → (x at step i - 1, predicted x0); `noise` is unused at step 0."""
    mean, log_variance, x0 = posterior(denoise, x, chain, i, clip_x0=clip_x0)
    return mean if i == 0 else mean + torch.exp(0.5 * log_variance) * noise, x0


def posterior(
    denoise: Denoise, x: Tensor, chain: DiscreteSchedule, i: int, *, clip_x0: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """Mean and log variance of p(x_{i-1} | x_i), and the predicted x0.

    Without a learned variance it is β ("fixed large"); at step 0, the posterior's.
    """
    prediction = denoise(x, float(chain.timesteps[i]))
    x0 = prediction.x0.clamp(-1, 1) if clip_x0 else prediction.x0
    row = chain.row(i)
    mean = row["posterior_mean_coef1"] * x0 + row["posterior_mean_coef2"] * x
    low, high = row["posterior_log_variance_clipped"], row["log_betas"]
    if prediction.variance is None:
        return mean, torch.full_like(x, high if i else low), x0
    return mean, interpolate_log_variance(prediction.variance, low, high), x0


def ddim(
    denoise: Denoise,
    x: Tensor,
    schedule: DiscreteSchedule,
    times: Sequence[float],
    generators: Sequence[torch.Generator] | None = None,
    *,
    eta: float = 0.0,
    clip_x0: bool = False,
    callback: Callback | None = None,
) -> Tensor:
    """DDIM (arXiv 2010.02502) on the chain of `times`, decreasing integers.

    `eta` 0 is deterministic, 1 adds as much noise as DDPM. Raises InputError if eta > 0 and there are no generators.
    """
    if eta and generators is None:
        raise InputError("ddim: eta > 0 draws noise and needs a generator per image")
    chain = _chain(schedule, times)
    for i in reversed(range(len(chain))):
        noise = draw_noise(generators, x.shape[1:], x.device) if eta and i else None
        x, x0 = ddim_step(denoise, x, chain, i, noise, eta=eta, clip_x0=clip_x0)
        x = report(callback, len(chain) - 1 - i, x, x0)
    return x


def ddim_step(
    denoise: Denoise, x: Tensor, chain: DiscreteSchedule, i: int, noise: Tensor | None, *, eta=0.0, clip_x0=False
) -> tuple[Tensor, Tensor]:
    """x at step i of a chain → (x at step i - 1 by equation 12, predicted x0)."""
    prediction = denoise(x, float(chain.timesteps[i]))
    x0, eps = prediction.x0, prediction.eps
    row = chain.row(i)
    now, before = (chain.tables[name][i].float() for name in ("alphas_cumprod", "alphas_cumprod_prev"))
    if clip_x0:
        x0 = x0.clamp(-1, 1)
        eps = (row["sqrt_recip_alphas_cumprod"] * x - x0) / row["sqrt_recipm1_alphas_cumprod"]
    # fp32 as in the authors' code: 1 - now / before loses digits in fp32, and published results include that error
    spread = (eta * ((1 - before) / (1 - now)).sqrt() * (1 - now / before).sqrt()).item()
    mean = before.sqrt().item() * x0 + (1 - before - spread**2).clamp(min=0).sqrt().item() * eps
    return mean + spread * noise if spread and i else mean, x0


def dpm_solver(
    denoise: Denoise,
    x: Tensor,
    schedule: DiscreteSchedule,
    times: Sequence[float],
    *,
    order: Literal[1, 2, 3] = 2,
    ending: Literal["sigma", "alpha"] = "sigma",
    callback: Callback | None = None,
) -> Tensor:
    """Multistep DPM-Solver++ (arXiv 2211.01095, algorithm 2) at decreasing times (fractional ones allowed), to time 0.

    `ending` "sigma" (PixArt-Σ) lowers the order in the last steps, "alpha" (PixArt-α) only with fewer than ten steps;
    "sigma" ends closer to the solution of many steps. As in the authors' code, there is no final step to σ = 0, and
    order 3 takes half the curvature term: its error is smaller than that of order 2 but converges at the same rate.
    """
    steps, times = len(times), [*times, 0.0]
    alphas, sigmas = zip(*(schedule.alpha_sigma(t) for t in times), strict=True)
    lambdas = [math.log(a / s) for a, s in zip(alphas, sigmas, strict=True)]  # half the log signal-to-noise ratio
    history: list[Tensor] = []  # predictions of x0, newest first
    for i in range(steps):
        history = [denoise(x, times[i]).x0, *history[: order - 1]]
        h = lambdas[i + 1] - lambdas[i]
        phi = math.expm1(-h)
        now_order = min(order, len(history))
        if ending == "sigma" or steps < 10:
            now_order = min(now_order, steps - i)
        x_next = sigmas[i + 1] / sigmas[i] * x - alphas[i + 1] * phi * history[0]
        if now_order == 2:
            slope = (history[0] - history[1]) / ((lambdas[i] - lambdas[i - 1]) / h)
            x_next = x_next - 0.5 * alphas[i + 1] * phi * slope
        elif now_order == 3:
            r0, r1 = (lambdas[i] - lambdas[i - 1]) / h, (lambdas[i - 1] - lambdas[i - 2]) / h
            near, far = (history[0] - history[1]) / r0, (history[1] - history[2]) / r1
            slope, curve = near + r0 / (r0 + r1) * (near - far), (near - far) / (r0 + r1)
            phi2 = phi / h + 1
            phi3 = phi2 / h - 0.5
            x_next = x_next + alphas[i + 1] * (phi2 * slope - phi3 * curve)
        x = report(callback, i, x_next, history[0])
    return x


def euler(
    denoise: Denoise,
    x: Tensor,
    schedule: FlowSchedule,
    times: Sequence[float],
    *,
    callback: Callback | None = None,
) -> Tensor:
    """Euler's method for flow models, at decreasing times, ending at time 0; one network call per step."""
    for i, (t, after) in enumerate(itertools.pairwise([*times, 0.0])):
        prediction = denoise(x, t)
        x = x + (after - t) / TRAIN_STEPS * (prediction.eps - prediction.x0)
        x = report(callback, i, x, prediction.x0)
    return x


def heun(
    denoise: Denoise,
    x: Tensor,
    schedule: FlowSchedule,
    times: Sequence[float],
    *,
    callback: Callback | None = None,
) -> Tensor:
    """Heun's second-order method for flow models; two network calls per step, one in the last, which ends at time 0."""
    for i, (t, after) in enumerate(itertools.pairwise([*times, 0.0])):
        step = (after - t) / TRAIN_STEPS
        prediction = denoise(x, t)
        velocity = prediction.eps - prediction.x0
        if i + 1 < len(times):
            prediction = denoise(x + step * velocity, after)
            velocity = (velocity + prediction.eps - prediction.x0) / 2
        x = report(callback, i, x + step * velocity, prediction.x0)
    return x


def _chain(schedule: DiscreteSchedule, times: Sequence[float]) -> DiscreteSchedule:
    """The respaced chain of `times`, decreasing integers."""
    if not isinstance(schedule, DiscreteSchedule):
        raise InputError("this sampler needs a discrete schedule; a flow model takes euler or heun")
    return schedule.at([int(t) for t in reversed(times)])


def report(callback: Callback | None, step: int, x: Tensor, x0: Tensor) -> Tensor:
    """Call the callback after a step; returns x, or the tensor with which the callback replaces it."""
    changed = None if callback is None else callback(step, x, x0)
    return x if changed is None else changed
