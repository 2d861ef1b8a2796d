"""Noise schedules: x_t = α(t)·x0 + σ(t)·ε, for discrete variance-preserving chains and rectified flow.

A time t is the value that the network receives: 0 (clean) … 999 (noise) for a discrete schedule, 0 … 1000 for flow;
fractional values are allowed. Coefficients come in two forms: Python floats for samplers, where the whole batch is at
one time, and fp32 tensors (B, 1, 1, 1) on the device for training, where every image has its own time.
"""

import itertools
import math
from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from pixart.config import setting
from pixart.errors import InputError
from pixart.ranges import check_choices, check_numbers

TRAIN_STEPS = 1000


@dataclass(frozen=True)
class DiffusionConfig:
    """Noise schedule, prediction type and loss weighting; stored with every model, because sampling needs them."""

    schedule: Literal["linear", "cosine", "flow"] = "linear"
    prediction: Literal["epsilon", "v", "x0", "velocity"] = "epsilon"
    times: Literal["uniform", "logit_normal"] = "uniform"  # distribution of training times
    logit_mean: float = 0.0  # of the logit-normal distribution; larger means noisier
    logit_std: float = setting(1.0, above=0)
    # above 1 means noisier training times: the fraction u of the noisiest one becomes s·u / (1 + (s - 1)·u)
    time_shift: float = setting(1.0, above=0)
    weighting: Literal["uniform", "min_snr", "snr_switch", "velocity", "uncertainty"] = "uniform"
    min_snr_gamma: float = setting(5.0, above=0)
    # contrastive flow matching: weight of the error towards another image's target, which is maximised; 0 is off
    contrast: float = setting(0.0, least=0, below=1)

    def __post_init__(self):
        check_numbers(self, "diffusion")
        check_choices(self, "diffusion")
        if self.prediction == "epsilon" and self.schedule == "flow":
            raise InputError(
                "diffusion: prediction 'epsilon' says nothing of the image at α = 0, where sampling of schedule 'flow' "
                "starts; flow takes velocity, v or x0"
            )
        if self.weighting == "snr_switch" and self.prediction != "epsilon":
            raise InputError("diffusion: weighting 'snr_switch' is defined for prediction 'epsilon'")
        if self.contrast and (self.schedule, self.prediction, self.weighting) != ("flow", "velocity", "uniform"):
            raise InputError(
                "diffusion: contrast is defined for schedule 'flow', prediction 'velocity' and weighting 'uniform'"
            )


class Schedule(ABC):
    """α(t) and σ(t) of a noising process."""

    last: float  # the time with the most noise

    @abstractmethod
    def alpha_sigma(self, t: float) -> tuple[float, float]:
        """α and σ at one time."""

    @abstractmethod
    def alpha_sigma_of(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """α and σ of a batch of times (B,) → fp32 (B, 1, 1, 1) each, on the device of `t`."""

    @abstractmethod
    def draw_times(self, uniform: Tensor, config: DiffusionConfig) -> Tensor:
        """Uniform numbers (B,) in [0, 1) → training times (B,). Deterministic, so that paired runs see equal times."""

    def time_of(self, ratio: float) -> float:
        """The time at which σ / α equals `ratio`, by bisection; σ / α increases with time."""
        low, high = 0.0, self.last
        for _ in range(60):
            middle = (low + high) / 2
            alpha, sigma = self.alpha_sigma(middle)
            low, high = (middle, high) if sigma < ratio * alpha else (low, middle)
        return low

    def add_noise(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """x_t for images or latents x0 (B, C, H, W) at times (B,)."""
        alpha, sigma = self.alpha_sigma_of(t)
        return alpha * x0 + sigma * noise


class DiscreteSchedule(Schedule):
    """A variance-preserving chain defined by β (DDPM, arXiv 2006.11239). Tables are float64, as in the authors' code.

    `timesteps[i]` is the time that the network receives at step i; in a respaced chain it differs from i.
    """

    def __init__(self, betas: np.ndarray, timesteps: np.ndarray | None = None):
        timesteps = np.arange(len(betas)) if timesteps is None else timesteps
        self.timesteps: list[int] = timesteps.tolist()
        self.last = float(timesteps[-1])
        cumprod = np.cumprod(1.0 - betas)  # ᾱ
        previous = np.append(1.0, cumprod[:-1])
        variance = betas * (1.0 - previous) / (1.0 - cumprod)  # of the posterior q(x_{t-1} | x_t, x0), equation 7
        tables = {
            "betas": betas,
            "alphas_cumprod": cumprod,
            "alphas_cumprod_prev": previous,
            "alpha": np.sqrt(cumprod),
            "sigma": np.sqrt(1.0 - cumprod),
            "sqrt_recip_alphas_cumprod": np.sqrt(1.0 / cumprod),
            "sqrt_recipm1_alphas_cumprod": np.sqrt(1.0 / cumprod - 1),
            "posterior_variance": variance,
            # the variance is 0 at step 0: replaced by that of step 1, or by β in a chain of one step
            "posterior_log_variance_clipped": np.log(np.append([*variance[1:2], betas[0]][0], variance[1:])),
            "log_betas": np.log(betas),
            "posterior_mean_coef1": betas * np.sqrt(previous) / (1.0 - cumprod),
            "posterior_mean_coef2": (1.0 - previous) * np.sqrt(1.0 - betas) / (1.0 - cumprod),
        }
        self.tables: dict[str, Tensor] = {name: torch.from_numpy(table) for name, table in tables.items()}
        self._log_alpha = (0.5 * np.log(cumprod)).tolist()
        self._by_device: dict[torch.device, dict[str, Tensor]] = {}

    @classmethod
    def linear(cls) -> "DiscreteSchedule":
        """β from 1e-4 to 0.02 in 1,000 steps, used to train every released PixArt."""
        return cls(np.linspace(1e-4, 0.02, TRAIN_STEPS))

    @classmethod
    def cosine(cls) -> "DiscreteSchedule":
        """The cosine schedule of arXiv 2102.09672, equation 17, with β clipped to 0.999."""
        bar = [math.cos((i / TRAIN_STEPS + 0.008) / 1.008 * math.pi / 2) ** 2 for i in range(TRAIN_STEPS + 1)]
        betas = [min(1 - after / before, 0.999) for before, after in itertools.pairwise(bar)]
        return cls(np.array(betas))

    def __len__(self) -> int:
        return len(self.timesteps)

    def respace(self, steps: int) -> "DiscreteSchedule":
        """The chain of `steps` evenly spaced steps of this one, with the same ᾱ at each (arXiv 2102.09672, section 4).

        Raises:
            InputError: `steps` outside 2 … len(self).
        """
        if not 2 <= steps <= len(self):
            raise InputError(f"steps: got {steps}, expected 2 to {len(self)}")
        stride = (len(self) - 1) / (steps - 1)
        return self.at([round(i * stride) for i in range(steps)])

    def at(self, kept: Sequence[int]) -> "DiscreteSchedule":
        """The chain of the steps `kept` of this one, in increasing order, with the same ᾱ at each."""
        kept = np.array(kept)
        cumprod = self.tables["alphas_cumprod"].numpy()[kept]
        betas = 1 - cumprod / np.append(1.0, cumprod[:-1])
        return DiscreteSchedule(betas, np.array(self.timesteps)[kept])

    def table(self, name: str, index: Tensor) -> Tensor:
        """A table's entries at integer steps (B,) → fp32 (B, 1, 1, 1) on the device of `index`."""
        if index.device not in self._by_device:
            self._by_device[index.device] = {k: v.float().to(index.device) for k, v in self.tables.items()}
        return self._by_device[index.device][name][index][:, None, None, None]

    def row(self, i: int) -> dict[str, float]:
        """Every table's entry at one step, rounded to fp32 as `table` returns it."""
        return {name: table[i].float().item() for name, table in self.tables.items()}

    def x0_from_epsilon(self, x_t: Tensor, epsilon: Tensor, t: Tensor) -> Tensor:
        """The clean image; from dedicated tables, because 1/α from an fp32 α is inaccurate where α is small."""
        coefficients = self.table("sqrt_recip_alphas_cumprod", t), self.table("sqrt_recipm1_alphas_cumprod", t)
        return coefficients[0] * x_t - coefficients[1] * epsilon

    def alpha_sigma_of(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return self.table("alpha", t), self.table("sigma", t)

    def alpha_sigma(self, t: float) -> tuple[float, float]:
        """log α is interpolated, and extrapolated, linearly (DPM-Solver, arXiv 2206.00927, appendix D.4)."""
        i = min(max(bisect_right(range(len(self)), t) - 1, 0), len(self) - 2)
        log_alpha = self._log_alpha[i] + (t - i) * (self._log_alpha[i + 1] - self._log_alpha[i])
        return math.exp(log_alpha), math.sqrt(-math.expm1(2 * log_alpha))

    def draw_times(self, uniform: Tensor, config: DiffusionConfig) -> Tensor:
        return (distribute(uniform, config) * len(self)).long().clamp(max=len(self) - 1)  # if it was rounded to 1


class FlowSchedule(Schedule):
    """Rectified flow: a straight line from image to noise, τ = t / 1000 (arXiv 2209.03003)."""

    last = float(TRAIN_STEPS)

    def alpha_sigma(self, t: float) -> tuple[float, float]:
        return 1 - t / TRAIN_STEPS, t / TRAIN_STEPS

    def alpha_sigma_of(self, t: Tensor) -> tuple[Tensor, Tensor]:
        tau = (t.float() / TRAIN_STEPS)[:, None, None, None]
        return 1 - tau, tau

    def draw_times(self, uniform: Tensor, config: DiffusionConfig) -> Tensor:
        return TRAIN_STEPS * distribute(uniform, config).float()


def distribute(uniform: Tensor, config: DiffusionConfig) -> Tensor:
    """Uniform numbers in [0, 1) → fractions of the noisiest time in [0, 1), distributed as configured.

    "logit_normal" applies the inverse distribution function (arXiv 2403.03206, equation 19); then follows the shift
    (equation 23).
    """
    if config.times == "logit_normal":
        normal = torch.special.ndtri(uniform.double().clamp(1e-9, 1 - 1e-9))
        uniform = torch.sigmoid(config.logit_mean + config.logit_std * normal)
    if config.time_shift != 1:
        shift, uniform = config.time_shift, uniform.double()
        uniform = shift * uniform / (1 + (shift - 1) * uniform)
    return uniform


def make_schedule(config: DiffusionConfig) -> Schedule:
    """The schedule that a config names."""
    return {"linear": DiscreteSchedule.linear, "cosine": DiscreteSchedule.cosine, "flow": FlowSchedule}[
        config.schedule
    ]()
