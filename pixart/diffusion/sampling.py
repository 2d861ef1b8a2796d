"""One record of sampling settings, and the one place where a sampler is chosen by name."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from pixart.diffusion import samplers
from pixart.diffusion.guidance import Denoise
from pixart.diffusion.schedule import FlowSchedule, Schedule
from pixart.errors import InputError


@dataclass(frozen=True)
class SampleConfig:
    """How to sample; a model carries its own as a recommendation. Options that a sampler lacks keep their defaults."""

    sampler: Literal["auto", "dpm_solver", "iddpm", "ddim", "euler", "heun"] = "auto"  # heun for flow, else dpm_solver
    steps: int | None = None  # the sampler's default
    guidance: float = 4.5  # 1 switches it off
    guidance_low: float = 0.0  # times at which to guide
    guidance_high: float = 1000.0
    rescale: float = 0.0  # of the guided contrast, 0 … 1
    order: Literal[1, 2, 3] = 2  # dpm_solver
    ending: Literal["sigma", "alpha"] = "sigma"  # dpm_solver
    eta: float = 0.0  # ddim
    clip_x0: bool = False  # iddpm and ddim, for models of pixels
    shift: float = 1.0  # euler and heun

    def __post_init__(self):
        if self.steps is not None and self.steps < 1:
            raise InputError(f"sample.steps: got {self.steps}, expected at least 1")
        if not 0 <= self.rescale <= 1 or self.guidance_low > self.guidance_high or self.shift <= 0 or self.eta < 0:
            raise InputError(
                "sample: expected rescale in [0, 1], guidance_low ≤ guidance_high, shift > 0 and eta ≥ 0, got "
                f"{self.rescale}, {self.guidance_low}, {self.guidance_high}, {self.shift} and {self.eta}"
            )


@dataclass(frozen=True)
class _Sampler:
    function: Callable[..., Tensor]
    steps: int  # the default
    options: tuple[str, ...]
    draws: bool = False  # takes a generator per picture


_SAMPLERS = {
    "dpm_solver": _Sampler(samplers.dpm_solver, 20, ("order", "ending")),
    "iddpm": _Sampler(samplers.iddpm, 100, ("clip_x0",), draws=True),
    "ddim": _Sampler(samplers.ddim, 50, ("eta", "clip_x0"), draws=True),
    "euler": _Sampler(samplers.euler, 30, ("shift",)),
    "heun": _Sampler(samplers.heun, 15, ("shift",)),
}
_FOR_FLOW = ("euler", "heun")
_OPTIONS = sorted({option for sampler in _SAMPLERS.values() for option in sampler.options})


def resolve(config: SampleConfig, schedule: Schedule) -> tuple[str, int]:
    """The sampler's name and steps for a schedule.

    Raises:
        InputError: the sampler does not fit the schedule, or lacks an option that is set.
    """
    flow = isinstance(schedule, FlowSchedule)
    name = config.sampler if config.sampler != "auto" else ("heun" if flow else "dpm_solver")
    if flow != (name in _FOR_FLOW):
        fitting = [other for other in _SAMPLERS if flow == (other in _FOR_FLOW)]
        raise InputError(f"sampler '{name}' does not fit this model's schedule, which takes {' or '.join(fitting)}")
    for option in _OPTIONS:
        if option not in _SAMPLERS[name].options and getattr(config, option) != getattr(SampleConfig, option):
            raise InputError(f"sampler '{name}' has no option '{option}'")
    return name, config.steps or _SAMPLERS[name].steps


def sample(
    denoise: Denoise,
    x: Tensor,
    schedule: Schedule,
    config: SampleConfig,
    generators: Sequence[torch.Generator],
    callback: samplers.Callback | None = None,
) -> Tensor:
    """From start noise (B, C, H, W) to scaled latents, by the config's sampler; a generator per picture."""
    name, steps = resolve(config, schedule)
    sampler = _SAMPLERS[name]
    options = {option: getattr(config, option) for option in sampler.options}
    if sampler.draws:
        options["generators"] = generators
    return sampler.function(denoise, x, schedule, steps, callback=callback, **options)
