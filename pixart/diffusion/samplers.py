"""Solvers: from noise to an image, each a function of `denoise`, x at the first time, and the times to visit.

Noise that a solver adds comes from one generator per image, on the CPU, so that an image depends on its own seed and
not on its batch. Coefficients are Python floats, computed before the loop touches the device.
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

# step just done (from 0), x after it, the clean image that its prediction implied; a tensor that is returned takes x's
# place
Callback = Callable[[int, Tensor, Tensor], Tensor | None]


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
    times: Sequence[float],
    generators: Sequence[torch.Generator],
    *,
    clip_x0: bool = False,
    callback: Callback | None = None,
) -> Tensor:
    """Ancestral sampling of the chain of `times` (improved DDPM, arXiv 2102.09672), with the learned variance if any.

    x: (B, C, H, W) at times[0]; the times are whole. `clip_x0` holds predicted images in [-1, 1]: right for pixels, not
    for latents.
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
    """x at step i of a chain → x at step i - 1, and the predicted x0; `noise` is not needed at step 0."""
    mean, log_variance, x0 = posterior(denoise, x, chain, i, clip_x0=clip_x0)
    return mean if i == 0 else mean + torch.exp(0.5 * log_variance) * noise, x0


def posterior(
    denoise: Denoise, x: Tensor, chain: DiscreteSchedule, i: int, *, clip_x0: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """Mean and log variance of p(x_{i-1} | x_i), and the predicted x0; without a learned variance, β's ("fixed
    large")."""
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
    """DDIM (arXiv 2010.02502) on the chain of `times`, which are whole; eta 0 draws no noise, eta 1 as much as DDPM."""
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
    """x at step i of a chain → x at step i - 1 (equation 12), and the predicted x0."""
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
    """Multistep DPM-Solver++ (arXiv 2211.01095, algorithm 2), over falling times, fractional allowed, and to time 0.

    The order falls towards the last step, which "sigma" (PixArt-Σ) always does and "alpha" (PixArt-α) only below ten
    steps; Σ's ending is nearer a fine solution. There is no last step to σ = 0, as in the authors' code. Their
    order 3 is kept too: it takes half the curvature term, so its error is smaller than order 2's but falls no faster.
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
    """Euler's method along the flow, over falling times and to time 0: one call of the network a step."""
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
    """Heun's second-order method along the flow: two calls a step, but one in the last, which ends at time 0."""
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
    """The chain that visits `times`, falling and whole."""
    if not isinstance(schedule, DiscreteSchedule):
        raise InputError("this sampler needs a discrete schedule; a flow model takes euler or heun")
    return schedule.at([int(t) for t in reversed(times)])


def report(callback: Callback | None, step: int, x: Tensor, x0: Tensor) -> Tensor:
    """x after a step, or what a callback puts in its place."""
    changed = None if callback is None else callback(step, x, x0)
    return x if changed is None else changed
