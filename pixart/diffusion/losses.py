"""Training losses, one value per image. Sources: DDPM (arXiv 2006.11239), improved DDPM (arXiv 2102.09672)."""

import math

import torch
from torch import Tensor

from pixart.diffusion.schedule import DiffusionConfig, DiscreteSchedule, Schedule
from pixart.errors import InputError

SNR_SWITCH_TIME = 249  # the authors' "snr" option weights the error of x0 up to this step and that of ε beyond it


def diffusion_loss(
    schedule: Schedule, config: DiffusionConfig, output: Tensor, x0: Tensor, noise: Tensor, t: Tensor
) -> dict[str, Tensor]:
    """Losses of a network's output for x_t = `schedule.add_noise(x0, noise, t)`.

    Args:
        output: (B, C, H, W), or (B, 2C, H, W) with a learned variance.
        x0, noise: (B, C, H, W), scaled latents and the standard normal noise that was added.
        t: (B,) times; integer steps for a discrete schedule.

    Returns:
        fp32 (B,) each: "loss" to minimise, "mse", and "vlb" in bits per dimension if the variance is learned.

    Raises:
        InputError: a wrong number of output channels, or a learned variance with a flow schedule.
    """
    output, x0 = output.float(), x0.float()
    channels = x0.shape[1]
    if output.shape[1] not in (channels, 2 * channels):
        raise InputError(f"output: got {output.shape[1]} channels, expected {channels} or {2 * channels}")
    alpha, sigma = schedule.alpha_sigma_of(t)
    target = prediction_target(config.prediction, x0, noise, alpha, sigma)
    prediction, variance = output[:, :channels], output[:, channels:]
    mse = per_image(loss_weight(config, t, alpha, sigma) * (prediction - target) ** 2)
    if not variance.shape[1]:
        return {"loss": mse, "mse": mse}
    if not isinstance(schedule, DiscreteSchedule):
        raise InputError("a learned variance (learn_sigma) needs a discrete schedule, not flow")
    x_t = alpha * x0 + sigma * noise
    # the mean is detached, so that the bound trains only the variance (improved DDPM, section 3.2)
    if config.prediction == "epsilon":
        mean_x0 = schedule.x0_from_epsilon(x_t, prediction.detach(), t)
    else:
        mean_x0 = to_x0(config, x_t, prediction.detach(), alpha, sigma)
    vlb = variational_bound(schedule, mean_x0, variance, x0, x_t, t)
    return {"loss": mse + vlb, "mse": mse, "vlb": vlb}


def prediction_target(prediction: str, x0: Tensor, noise: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """The regression target of the network's output, for a prediction type."""
    if prediction == "epsilon":
        return noise
    if prediction == "x0":
        return x0
    if prediction == "v":
        return alpha * noise - sigma * x0  # arXiv 2202.00512, appendix D
    assert prediction == "velocity"
    return noise - x0


def to_x0(config: DiffusionConfig, x_t: Tensor, output: Tensor, alpha, sigma) -> Tensor:
    """The clean image that an output implies; α and σ are floats or tensors."""
    if config.prediction == "epsilon":
        return x_t / alpha - sigma / alpha * output
    if config.prediction == "x0":
        return output
    x0 = alpha * x_t - sigma * output if config.prediction == "v" else x_t - sigma * output
    divisor = _divisor(config, alpha, sigma)
    return x0 if divisor is None else x0 / divisor


def _divisor(config: DiffusionConfig, alpha, sigma):
    """What `to_x0` divides by: α² + σ² for "v", α + σ for "velocity"; None if the schedule makes it 1."""
    if config.prediction == "v" and config.schedule == "flow":
        return alpha**2 + sigma**2
    if config.prediction == "velocity" and config.schedule != "flow":
        return alpha + sigma
    return None


def loss_weight(config: DiffusionConfig, t: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor | float:
    """Weight of the squared error of the output, per image.

    "uniform": 1.
    "min_snr": equivalent to min(SNR, γ) on the error of x0 (arXiv 2303.09556), for every prediction type.
    "velocity": equivalent to a uniform weight on the error of the velocity, for every prediction type; σ is clamped to
        at least 0.05 in 1/σ².
    "snr_switch": the authors' option: the error of ε at late steps, of x0 at early ones.
    """
    if config.weighting in ("uniform", "uncertainty"):  # the latter weighs the whole loss, see `uncertainty`
        return 1.0
    # (d x0 / d output)²: converts a weight on the error of x0 to one on the error of the output
    squared = {"epsilon": (sigma / alpha) ** 2, "x0": 1.0, "v": sigma**2, "velocity": sigma**2}[config.prediction]
    if (divisor := _divisor(config, alpha, sigma)) is not None:
        squared = squared / divisor**2
    if config.weighting == "min_snr":
        return ((alpha / sigma) ** 2).clamp(max=config.min_snr_gamma) * squared
    if config.weighting == "velocity":
        return squared / sigma.clamp(min=0.05) ** 2
    assert config.weighting == "snr_switch"
    return torch.where(t[:, None, None, None] > SNR_SWITCH_TIME, 1.0, squared)


def variational_bound(
    schedule: DiscreteSchedule, mean_x0: Tensor, variance: Tensor, x0: Tensor, x_t: Tensor, t: Tensor
) -> Tensor:
    """The terms of the variational bound at steps t (B,) of the chain, in bits per dimension: (B,).

    KL(q(x_{t-1} | x_t, x0) ‖ p(x_{t-1} | x_t)); at step 0, the negative log-likelihood of the image.
    `mean_x0` is the predicted clean image, `variance` the raw output in [-1, 1].
    """
    coef1, coef2 = schedule.table("posterior_mean_coef1", t), schedule.table("posterior_mean_coef2", t)
    true_mean, mean = coef1 * x0 + coef2 * x_t, coef1 * mean_x0 + coef2 * x_t
    true_log_variance = schedule.table("posterior_log_variance_clipped", t)
    log_variance = interpolate_log_variance(variance, true_log_variance, schedule.table("log_betas", t))
    log_ratio = true_log_variance - log_variance
    kl = 0.5 * (-log_ratio - 1 + torch.exp(log_ratio) + (true_mean - mean) ** 2 * torch.exp(-log_variance))
    nll = -discretized_gaussian_log_likelihood(x0, mean, 0.5 * log_variance)
    return torch.where(t == 0, per_image(nll), per_image(kl)) / math.log(2)


def interpolate_log_variance(variance: Tensor, low, high) -> Tensor:
    """Raw output in [-1, 1] → log variance between `low` and `high` (improved DDPM, equation 15)."""
    fraction = (variance + 1) / 2
    return fraction * high + (1 - fraction) * low


def discretized_gaussian_log_likelihood(x: Tensor, mean: Tensor, log_scale: Tensor) -> Tensor:
    """Log probability of the bin of width 2/255 around x in [-1, 1] (DDPM, equation 13)."""

    def cdf(z: Tensor) -> Tensor:  # tanh approximation of the normal CDF, as in the authors' training
        return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))

    centered, inverse = x - mean, torch.exp(-log_scale)
    above, below = cdf(inverse * (centered + 1 / 255)), cdf(inverse * (centered - 1 / 255))
    probability = torch.where(x < -0.999, above, torch.where(x > 0.999, 1 - below, above - below))
    return probability.clamp(min=1e-12).log()


def per_image(values: Tensor) -> Tensor:
    """Mean over all but the first dimension."""
    return values.flatten(1).mean(1)
