"""One record of sampling settings, and the one place where a sampler is chosen by name."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from pixart.config import names_with, setting
from pixart.diffusion import distilled, samplers
from pixart.diffusion.guidance import Denoise
from pixart.diffusion.sa_solver import sa_solver
from pixart.diffusion.schedule import TRAIN_STEPS, FlowSchedule, Schedule
from pixart.diffusion.timesteps import SPACINGS, chain_times, check_times, uniform
from pixart.errors import InputError
from pixart.registry import Registry


@dataclass(frozen=True)
class SampleConfig:
    """How to sample; a model carries its own as a recommendation. Options that a sampler lacks keep their defaults."""

    # auto: heun for flow, else dpm_solver. lcm and dmd are for models that were distilled for them
    sampler: str = "auto"  # a key of SAMPLERS
    steps: int | None = None  # the sampler's default
    guidance: float | None = None  # the sampler's default: 4.5, and 1, which is off, for lcm and dmd
    guidance_low: float = 0.0  # times at which to guide
    guidance_high: float = 1000.0
    rescale: float = 0.0  # of the guided contrast, 0 … 1
    order: Literal[1, 2, 3] = setting(2, option=True)  # dpm_solver
    ending: Literal["sigma", "alpha"] = setting("sigma", option=True)  # dpm_solver
    eta: float = setting(0.0, option=True)  # ddim
    tau: float = setting(1.0, option=True)  # sa_solver: noise added on the way, 0 is none
    clip_x0: bool = setting(False, option=True)  # iddpm and ddim, for models of pixels
    shift: float = setting(1.0, option=True)  # euler and heun
    spacing: str = "auto"  # of the times: a key of SPACINGS; auto is the sampler's own
    times: tuple[float, ...] = ()  # a list of one's own instead of steps and spacing, falling

    def __post_init__(self):
        if self.steps is not None and self.steps < 1:
            raise InputError(f"sample.steps: got {self.steps}, expected at least 1")
        if not 0 <= self.rescale <= 1 or self.guidance_low > self.guidance_high:
            raise InputError(
                "sample: expected rescale in [0, 1] and guidance_low ≤ guidance_high, got "
                f"{self.rescale}, {self.guidance_low} and {self.guidance_high}"
            )
        if self.shift <= 0 or self.eta < 0 or self.tau < 0:
            raise InputError(
                f"sample: expected shift > 0, eta ≥ 0 and tau ≥ 0, got {self.shift}, {self.eta} and {self.tau}"
            )


@dataclass(frozen=True)
class Sampler:
    """A solver and what it takes: function(denoise, x, schedule, times, *, callback, …options) → scaled latents."""

    function: Callable[..., Tensor]
    steps: int  # the default
    options: tuple[str, ...] = ()
    least: int = 1  # steps that it takes
    most: int | None = None
    draws: bool = False  # takes a generator per image
    distilled: bool = False  # guidance is in the weights
    flow: bool = False  # for flow schedules; else for discrete ones
    own: Callable[[Schedule, int], Sequence[float]] | None = None  # its own times of so many steps; none is uniform
    spacings: tuple[str, ...] = ()  # what else it takes
    whole: bool = False  # takes whole times alone
    midway: bool = True  # may start from an image with noise


def _dmd_times(schedule: Schedule, steps: int) -> list[float]:
    return [distilled.DMD_TIME]


_ANY, _CHAIN = ("uniform", "trailing", "karras"), {"whole": True, "spacings": ("trailing", "karras")}
SAMPLERS: Registry[Sampler] = Registry("sampler")
for _name, _sampler in {
    "dpm_solver": Sampler(samplers.dpm_solver, 20, ("order", "ending"), spacings=_ANY),
    "iddpm": Sampler(samplers.iddpm, 100, ("clip_x0",), 2, TRAIN_STEPS, draws=True, own=chain_times, **_CHAIN),
    "ddim": Sampler(samplers.ddim, 50, ("eta", "clip_x0"), 2, TRAIN_STEPS, draws=True, own=chain_times, **_CHAIN),
    "sa_solver": Sampler(sa_solver, 25, ("tau",), draws=True, spacings=_ANY),
    "lcm": Sampler(
        distilled.lcm, 4, (), 1, distilled.LCM_GRID, draws=True, distilled=True, own=distilled.lcm_times, whole=True
    ),
    "dmd": Sampler(distilled.dmd, 1, (), 1, 1, distilled=True, own=_dmd_times, midway=False),
    "euler": Sampler(samplers.euler, 30, ("shift",), flow=True, spacings=("uniform",)),
    "heun": Sampler(samplers.heun, 15, ("shift",), flow=True, spacings=("uniform",)),
}.items():
    SAMPLERS.register(_name)(_sampler)
GUIDANCE = 4.5  # of the released models


def resolve(config: SampleConfig, schedule: Schedule) -> SampleConfig:
    """The config with sampler, steps and guidance filled in for a schedule.

    Raises:
        InputError: the sampler does not fit the schedule, lacks an option that is set, or takes other numbers of steps.
    """
    flow = isinstance(schedule, FlowSchedule)
    name = config.sampler if config.sampler != "auto" else ("heun" if flow else "dpm_solver")
    chosen = SAMPLERS[name]
    if flow != chosen.flow:
        fitting = [other for other in SAMPLERS if flow == SAMPLERS[other].flow]
        raise InputError(f"sampler '{name}' does not fit this model's schedule, which takes {' or '.join(fitting)}")
    for option in names_with(SampleConfig, "option", True):
        if option not in chosen.options and getattr(config, option) != getattr(SampleConfig, option):
            raise InputError(f"sampler '{name}' has no option '{option}'")
    guidance = config.guidance if config.guidance is not None else 1.0 if chosen.distilled else GUIDANCE
    if chosen.distilled and guidance != 1:
        raise InputError(f"sampler '{name}' is for models with guidance in their weights: got {guidance}, set it to 1")
    if config.times and (config.steps not in (None, len(config.times)) or config.spacing != "auto"):
        raise InputError("sample.times are all that a sampler visits; leave sample.steps and sample.spacing out")
    steps = len(config.times) or config.steps or chosen.steps
    _check_steps(name, steps, config.order)
    if config.spacing != "auto":
        _ = SPACINGS[config.spacing]
        if config.spacing not in chosen.spacings:
            taken = ", ".join(chosen.spacings) or "none but its own (auto)"
            raise InputError(f"sampler '{name}' cannot take sample.spacing '{config.spacing}'; it takes {taken}")
    config = replace(config, sampler=name, steps=steps, guidance=guidance)
    visited_times(config, schedule)
    return config


def visited_times(config: SampleConfig, schedule: Schedule) -> list[float]:
    """The falling times at which a resolved config's sampler calls the network; the last int(steps · strength) of them
    are those of a process that starts midway."""
    chosen = SAMPLERS[config.sampler]
    if config.times:
        return check_times(config.times, schedule, whole=chosen.whole)
    if config.spacing == "auto":
        return list(chosen.own(schedule, config.steps) if chosen.own else uniform(schedule, config.steps, config.shift))
    times = SPACINGS[config.spacing](schedule, config.steps, config.shift)
    if not chosen.whole:
        return times
    whole = [float(round(t)) for t in times]
    if len(set(whole)) < len(whole):
        raise InputError(
            f"sample.spacing '{config.spacing}' with {len(whole)} steps visits a whole time twice, which sampler "
            f"'{config.sampler}' cannot; take fewer steps"
        )
    return whole


def _check_steps(name: str, steps: int, order: int) -> None:
    """Refuse numbers of steps that a sampler itself would refuse, which is after the text encoder's work."""
    if name == "dpm_solver" and steps < order:
        raise InputError(
            f"sampler '{name}': got {steps} steps, expected at least {order}, its order; or set order to {steps} too"
        )
    least, most = SAMPLERS[name].least, SAMPLERS[name].most
    if most is not None and not least <= steps <= most:
        expected = "it has one" if most == 1 else f"expected {least} to {most}"
        raise InputError(f"sampler '{name}': got {steps} steps, {expected}")


def sample(
    denoise: Denoise,
    x: Tensor,
    schedule: Schedule,
    config: SampleConfig,
    generators: Sequence[torch.Generator],
    callback: samplers.Callback | None = None,
    *,
    times: Sequence[float] | None = None,
) -> Tensor:
    """From x (B, C, H, W) at the first time to scaled latents, by the config's sampler; a generator per image.

    `times` are those to visit, all that the config says by default: x is then standard normal noise.
    """
    config = resolve(config, schedule)
    sampler = SAMPLERS[config.sampler]
    options = {option: getattr(config, option) for option in sampler.options if option != "shift"}
    if sampler.draws:
        options["generators"] = generators
    times = visited_times(config, schedule) if times is None else times
    return sampler.function(denoise, x, schedule, times, callback=callback, **options)
