"""From a network to a `denoise(x, t) -> Prediction` that samplers step with, and classifier-free guidance around it."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from pixart.diffusion.losses import to_x0
from pixart.diffusion.schedule import DiffusionConfig, Schedule
from pixart.errors import InputError


class Prediction(NamedTuple):
    """What a network says about x_t, in the two forms that samplers use; fp32 (B, C, H, W) each."""

    eps: Tensor
    x0: Tensor
    variance: Tensor | None = None  # the raw variance output in [-1, 1], where there is one


Denoise = Callable[[Tensor, float], Prediction]  # x_t (B, C, H, W) and one time for all


def make_denoise(network: Callable[[Tensor, Tensor], Tensor], schedule: Schedule, config: DiffusionConfig) -> Denoise:
    """Wrap `network(x, t)` (t as (B,)), whose output is read as the config's prediction type."""

    def denoise(x: Tensor, t: float) -> Prediction:
        output = network(x, torch.full((x.shape[0],), t, dtype=torch.float32, device=x.device)).float()
        x, channels = x.float(), x.shape[1]
        if output.shape[1] not in (channels, 2 * channels):
            raise InputError(
                f"network: got {output.shape[1]} channels out for {channels} in, expected as many or twice"
            )
        alpha, sigma = schedule.alpha_sigma(t)
        output, variance = output[:, :channels], output[:, channels:]
        x0 = to_x0(config.prediction, x, output, alpha, sigma)
        eps = output if config.prediction == "epsilon" else (x - alpha * x0) / sigma
        return Prediction(eps, x0, variance if variance.shape[1] else None)

    return denoise


def guide(
    conditional: Denoise,
    both: Denoise,
    schedule: Schedule,
    scale: float,
    *,
    interval: tuple[float, float] = (0.0, 1000.0),
    rescale: float = 0.0,
) -> Denoise:
    """Classifier-free guidance (arXiv 2207.12598): null + scale · (conditional - null), on every noise channel.

    Args:
        conditional: denoises B pictures under their captions.
        both: denoises 2B, the first half under the captions, the second under the null caption.
        scale: 1 means no guidance, and costs none.
        interval: times at which to guide, ends included (arXiv 2404.07724); outside it only `conditional` is called.
        rescale: 0 … 1, how far the guided x0 gets back the conditional one's contrast (arXiv 2305.08891, section 3.4).
    """
    if not 0 <= rescale <= 1:
        raise InputError(f"guidance rescale: got {rescale}, expected 0 to 1")
    if interval[0] > interval[1]:
        raise InputError(f"guidance interval: got {interval}, expected (low, high)")

    def denoise(x: Tensor, t: float) -> Prediction:
        if scale == 1 or not interval[0] <= t <= interval[1]:
            return conditional(x, t)
        prediction = both(torch.cat([x, x]), t)
        (eps, null_eps), (x0, null_x0) = prediction.eps.chunk(2), prediction.x0.chunk(2)
        guided = Prediction(
            null_eps + scale * (eps - null_eps),
            null_x0 + scale * (x0 - null_x0),
            None if prediction.variance is None else prediction.variance.chunk(2)[0],
        )
        if not rescale:
            return guided
        contrast = x0.std(dim=(1, 2, 3), keepdim=True) / guided.x0.std(dim=(1, 2, 3), keepdim=True)
        rescaled = guided.x0 * (rescale * contrast + 1 - rescale)
        alpha, sigma = schedule.alpha_sigma(t)
        return guided._replace(x0=rescaled, eps=(x - alpha * rescaled) / sigma)

    return denoise
