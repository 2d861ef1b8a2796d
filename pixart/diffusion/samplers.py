"""Samplers: from noise to a picture, each a function of `denoise`, the start noise and a number of steps.

Noise that a sampler adds comes from one generator per picture, on the CPU, so that a picture depends on its own seed
and not on its batch. Coefficients are Python floats, computed before the loop touches the device.
"""

import math
from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor

from pixart.diffusion.guidance import Denoise
from pixart.diffusion.losses import interpolate_log_variance
from pixart.diffusion.schedule import TRAIN_STEPS, DiscreteSchedule, FlowSchedule
from pixart.errors import InputError

Callback = Callable[[int, Tensor], None]  # step just done (from 0) and x after it


def draw_noise(generators: Sequence[torch.Generator], shape: Sequence[int], device=None) -> Tensor:
    """Standard normal fp32 (B, *shape), row i from generator i."""
    noise = torch.stack([torch.randn(tuple(shape), generator=g, device="cpu") for g in generators])
    if device is not None and torch.device(device).type == "cuda":
        noise = noise.pin_memory()  # or the copy would wait until the GPU is done with all steps before
    return noise.to(device, non_blocking=True)


def iddpm(
    denoise: Denoise,
    x: Tensor,
    schedule: DiscreteSchedule,
    steps: int,
    generators: Sequence[torch.Generator],
    *,
    clip_x0: bool = False,
    callback: Callback | None = None,
) -> Tensor:
    """Ancestral sampling of the respaced chain (improved DDPM, arXiv 2102.09672), with the learned variance if any.

    x: standard normal (B, C, H, W). `clip_x0` holds predicted pictures in [-1, 1]: right for pixels, not for latents.
    """
    chain = _respaced(schedule, steps)
    for i in reversed(range(steps)):
        noise = draw_noise(generators, x.shape[1:], x.device) if i else None
        x = iddpm_step(denoise, x, chain, i, noise, clip_x0=clip_x0)
        report(callback, steps - 1 - i, x)
    return x


def iddpm_step(
    denoise: Denoise, x: Tensor, chain: DiscreteSchedule, i: int, noise: Tensor | None, *, clip_x0: bool = False
) -> Tensor:
    """x at step i of a chain → x at step i - 1; `noise` is not needed at step 0."""
    mean, log_variance = posterior(denoise, x, chain, i, clip_x0=clip_x0)
    return mean if i == 0 else mean + torch.exp(0.5 * log_variance) * noise


def posterior(
    denoise: Denoise, x: Tensor, chain: DiscreteSchedule, i: int, *, clip_x0: bool = False
) -> tuple[Tensor, Tensor]:
    """Mean and log variance of p(x_{i-1} | x_i); without a learned variance, β's ("fixed large")."""
    prediction = denoise(x, float(chain.timesteps[i]))
    x0 = prediction.x0.clamp(-1, 1) if clip_x0 else prediction.x0
    row = chain.row(i)
    mean = row["posterior_mean_coef1"] * x0 + row["posterior_mean_coef2"] * x
    low, high = row["posterior_log_variance_clipped"], row["log_betas"]
    if prediction.variance is None:
        return mean, torch.full_like(x, high if i else low)
    return mean, interpolate_log_variance(prediction.variance, low, high)


def ddim(
    denoise: Denoise,
    x: Tensor,
    schedule: DiscreteSchedule,
    steps: int,
    generators: Sequence[torch.Generator] | None = None,
    *,
    eta: float = 0.0,
    clip_x0: bool = False,
    callback: Callback | None = None,
) -> Tensor:
    """DDIM (arXiv 2010.02502) on the respaced chain; eta 0 draws no noise, eta 1 as much as DDPM."""
    if eta and generators is None:
        raise InputError("ddim: eta > 0 draws noise and needs a generator per picture")
    chain = _respaced(schedule, steps)
    for i in reversed(range(steps)):
        noise = draw_noise(generators, x.shape[1:], x.device) if eta and i else None
        x = ddim_step(denoise, x, chain, i, noise, eta=eta, clip_x0=clip_x0)
        report(callback, steps - 1 - i, x)
    return x


def ddim_step(
    denoise: Denoise, x: Tensor, chain: DiscreteSchedule, i: int, noise: Tensor | None, *, eta=0.0, clip_x0=False
) -> Tensor:
    """x at step i of a chain → x at step i - 1 (equation 12)."""
    prediction = denoise(x, float(chain.timesteps[i]))
    x0, eps = prediction.x0, prediction.eps
    row = chain.row(i)
    now, before = (chain.tables[name][i].float() for name in ("alphas_cumprod", "alphas_cumprod_prev"))
    if clip_x0:
        x0 = x0.clamp(-1, 1)
        eps = (row["sqrt_recip_alphas_cumprod"] * x - x0) / row["sqrt_recipm1_alphas_cumprod"]
    # fp32, as in the authors' code: 1 - now / before loses digits there, and the released figures have that error
    spread = (eta * ((1 - before) / (1 - now)).sqrt() * (1 - now / before).sqrt()).item()
    mean = before.sqrt().item() * x0 + (1 - before - spread**2).clamp(min=0).sqrt().item() * eps
    return mean + spread * noise if spread and i else mean


def dpm_solver(
    denoise: Denoise,
    x: Tensor,
    schedule: DiscreteSchedule,
    steps: int,
    *,
    order: Literal[1, 2, 3] = 2,
    ending: Literal["sigma", "alpha"] = "sigma",
    callback: Callback | None = None,
) -> Tensor:
    """Multistep DPM-Solver++ (arXiv 2211.01095, algorithm 2), in uniform and fractional times from 999 to 0.

    The order falls towards the last step, which "sigma" (PixArt-Σ) always does and "alpha" (PixArt-α) only below ten
    steps; Σ's ending is nearer a fine solution. There is no last step to σ = 0, as in the authors' code. Their
    order 3 is kept too: it takes half the curvature term, so its error is smaller than order 2's but falls no faster.
    """
    if steps < order:
        raise InputError(f"dpm_solver: got {steps} steps, expected at least the order, {order}")
    times = [schedule.last * (1 - i / steps) for i in range(steps + 1)]
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
        x = x_next
        report(callback, i, x)
    return x


def flow_times(steps: int, shift: float = 1.0) -> list[float]:
    """Times from 1000 to 0; a shift above 1 spends more steps in noise (arXiv 2403.03206, equation 23)."""
    if steps < 1 or shift <= 0:
        raise InputError(f"flow sampling: got {steps} steps and shift {shift}, expected both positive")
    uniform = (1 - i / steps for i in range(steps + 1))
    return [TRAIN_STEPS * shift * u / (1 + (shift - 1) * u) for u in uniform]


def euler(
    denoise: Denoise,
    x: Tensor,
    schedule: FlowSchedule,
    steps: int,
    *,
    shift: float = 1.0,
    callback: Callback | None = None,
) -> Tensor:
    """Euler's method along the flow: one call of the network a step."""
    times = flow_times(steps, shift)
    for i in range(steps):
        prediction = denoise(x, times[i])
        x = x + (times[i + 1] - times[i]) / TRAIN_STEPS * (prediction.eps - prediction.x0)
        report(callback, i, x)
    return x


def heun(
    denoise: Denoise,
    x: Tensor,
    schedule: FlowSchedule,
    steps: int,
    *,
    shift: float = 1.0,
    callback: Callback | None = None,
) -> Tensor:
    """Heun's second-order method along the flow: two calls a step, but one in the last, which ends at time 0."""
    times = flow_times(steps, shift)
    for i in range(steps):
        step = (times[i + 1] - times[i]) / TRAIN_STEPS
        prediction = denoise(x, times[i])
        velocity = prediction.eps - prediction.x0
        if i + 1 < steps:
            prediction = denoise(x + step * velocity, times[i + 1])
            velocity = (velocity + prediction.eps - prediction.x0) / 2
        x = x + step * velocity
        report(callback, i, x)
    return x


def _respaced(schedule: DiscreteSchedule, steps: int) -> DiscreteSchedule:
    if not isinstance(schedule, DiscreteSchedule):
        raise InputError("this sampler needs a discrete schedule; a flow model takes euler or heun")
    return schedule.respace(steps)


def report(callback: Callback | None, step: int, x: Tensor) -> None:
    """Call a callback, if there is one."""
    if callback is not None:
        callback(step, x)
