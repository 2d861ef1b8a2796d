"""Turns a network into the `denoise(x, t) -> Prediction` that samplers call, and applies guidance to it."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from pixart.diffusion.losses import to_x0
from pixart.diffusion.schedule import DiffusionConfig, Schedule
from pixart.errors import InputError


class Prediction(NamedTuple):
    """A network's prediction for x_t, in the two forms that samplers use; fp32 (B, C, H, W) each."""

    eps: Tensor
    x0: Tensor
    variance: Tensor | None = None  # the raw variance output in [-1, 1], if the network has one


Denoise = Callable[[Tensor, float], Prediction]  # x_t (B, C, H, W) and one time for the whole batch


def make_denoise(network: Callable[[Tensor, Tensor], Tensor], schedule: Schedule, config: DiffusionConfig) -> Denoise:
    """Wrap `network(x, t)`, t of shape (B,), whose output is of the config's prediction type.

    Raises:
        InputError: when called, if the network returns neither C nor 2·C channels.
    """

    def denoise(x: Tensor, t: float) -> Prediction:
        output = network(x, torch.full((x.shape[0],), t, dtype=torch.float32, device=x.device)).float()
        x, channels = x.float(), x.shape[1]
        if output.shape[1] not in (channels, 2 * channels):
            raise InputError(
                f"network: got {output.shape[1]} channels out for {channels} in, expected as many or twice"
            )
        alpha, sigma = schedule.alpha_sigma(t)
        output, variance = output[:, :channels], output[:, channels:]
        x0 = to_x0(config, x, output, alpha, sigma)
        eps = output if config.prediction == "epsilon" else (x - alpha * x0) / sigma
        return Prediction(eps, x0, variance if variance.shape[1] else None)

    return denoise


def guide(
    first: Denoise,
    second: Denoise | None,
    schedule: Schedule,
    scale: float,
    *,
    together: Denoise | None = None,
    interval: tuple[float, float] = (0.0, 1000.0),
    rescale: float = 0.0,
) -> Denoise:
    """Guidance away from a second denoiser: second + scale · (first - second), on every noise channel.

    If `second` has the null caption, this is classifier-free guidance (arXiv 2207.12598); if it is a weaker model,
    autoguidance (arXiv 2406.02507).

    Args:
        first, second: denoisers of B images; `second` may be None if `together` is given.
        together: denoises 2B images, the first half like `first` and the rest like `second`: one call instead of two.
        scale: guidance scale; 1 disables guidance, and then only `first` is called.
        interval: times (low, high), inclusive, at which guidance applies (arXiv 2404.07724); outside it only `first`
            is called.
        rescale: 0 … 1, how far the standard deviation of the guided x0 is moved back to that of the first one
            (arXiv 2305.08891, section 3.4).

    Raises:
        InputError: rescale or interval out of range, or neither `second` nor `together` given.
    """
    if not 0 <= rescale <= 1:
        raise InputError(f"guidance rescale: got {rescale}, expected 0 to 1")
    if interval[0] > interval[1]:
        raise InputError(f"guidance interval: got {interval}, expected (low, high)")
    if second is None and together is None:
        raise InputError("guide: got neither a second denoiser nor one for both together")

    def denoise(x: Tensor, t: float) -> Prediction:
        if scale == 1 or not interval[0] <= t <= interval[1]:
            return first(x, t)
        here, there = (first(x, t), second(x, t)) if together is None else _halves(together(torch.cat([x, x]), t))
        guided = Prediction(
            there.eps + scale * (here.eps - there.eps), there.x0 + scale * (here.x0 - there.x0), here.variance
        )
        if not rescale:
            return guided
        contrast = here.x0.std(dim=(1, 2, 3), keepdim=True) / guided.x0.std(dim=(1, 2, 3), keepdim=True)
        rescaled = guided.x0 * (rescale * contrast + 1 - rescale)
        alpha, sigma = schedule.alpha_sigma(t)
        return guided._replace(x0=rescaled, eps=(x - alpha * rescaled) / sigma)

    return denoise


def _halves(prediction: Prediction) -> tuple[Prediction, Prediction]:
    """Split a prediction for 2B images into those for the first B and the last B."""
    parts = [(None, None) if value is None else value.chunk(2) for value in prediction]
    return Prediction(*(part[0] for part in parts)), Prediction(*(part[1] for part in parts))
