"""Sampling settings, and the registry that selects a sampler by name."""

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
from pixart.ranges import check_numbers
from pixart.registry import Registry


@dataclass(frozen=True)
class SampleConfig:
    """Sampling settings; a model's config.json holds recommended ones. An option that the chosen sampler does not have
    must keep its default."""

    # a key of SAMPLERS, or auto: heun for flow models, else dpm_solver; lcm and dmd need models distilled for them
    sampler: str = "auto"
    steps: int | None = setting(None, least=1, most=1_000_000)  # None: the sampler's default
    guidance: float | None = None  # scale; None: 4.5, or 1 (off) for lcm and dmd
    guidance_low: float = 0.0  # guidance applies at times from guidance_low to guidance_high, inclusive
    guidance_high: float = 1000.0
    rescale: float = setting(0.0, least=0, most=1)  # guidance rescale, 0 … 1 (arXiv 2305.08891)
    order: Literal[1, 2, 3] = setting(2, option=True)  # dpm_solver
    ending: Literal["sigma", "alpha"] = setting("sigma", option=True)  # dpm_solver
    eta: float = setting(0.0, least=0, option=True)  # ddim
    tau: float = setting(1.0, least=0, option=True)  # sa_solver: amount of noise added, 0 for none
    clip_x0: bool = setting(False, option=True)  # iddpm and ddim: clamp x0 to [-1, 1], for models of pixels
    shift: float = setting(1.0, above=0, option=True)  # euler and heun: above 1, more steps at high noise
    spacing: str = "auto"  # a key of SPACINGS; auto: the sampler's own
    # explicit times in decreasing order, in place of steps and spacing
    times: tuple[float, ...] = setting((), least=0, most=1000)

    def __post_init__(self):
        check_numbers(self, "sample")
        if self.guidance_low > self.guidance_high:
            raise InputError(
                f"sample: expected guidance_low ≤ guidance_high, got {self.guidance_low} and {self.guidance_high}"
            )


@dataclass(frozen=True)
class Sampler:
    """A solver, function(denoise, x, schedule, times, *, callback, …options) → scaled latents, and its properties."""

    function: Callable[..., Tensor]
    steps: int  # default number of steps
    options: tuple[str, ...] = ()  # fields of SampleConfig passed to `function`
    least: int = 1  # smallest number of steps
    most: int | None = None  # largest number of steps
    draws: bool = False  # takes one generator per image
    distilled: bool = False  # guidance is built into the weights
    flow: bool = False  # for flow schedules; otherwise for discrete ones
    own: Callable[[Schedule, int], Sequence[float]] | None = None  # (schedule, steps) → its own times; None: uniform
    spacings: tuple[str, ...] = ()  # further spacings it accepts
    whole: bool = False  # accepts only integer times
    midway: bool = True  # can start from a noised image


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
GUIDANCE = 4.5  # recommended for the released models


def resolve(config: SampleConfig, schedule: Schedule) -> SampleConfig:
    """The config with sampler, steps and guidance filled in for a schedule.

    Raises:
        InputError: the sampler does not fit the schedule, lacks an option that is set, or does not accept this number
            of steps, spacing or list of times.
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
    """The decreasing times at which a resolved config's sampler calls the network."""
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
    """Refuse a number of steps before any work is done, not when the sampler runs, after the text encoder has."""
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
    """Run the config's sampler from x (B, C, H, W) at the first time; returns scaled latents.

    Args:
        x: standard normal noise; if `times` starts midway, a noised image at times[0].
        generators: one per image, for samplers that add noise.
        times: times to visit; by default all those of the config.

    Raises:
        InputError: as `resolve`.
    """
    config = resolve(config, schedule)
    sampler = SAMPLERS[config.sampler]
    options = {option: getattr(config, option) for option in sampler.options if option != "shift"}
    if sampler.draws:
        options["generators"] = generators
    times = visited_times(config, schedule) if times is None else times
    return sampler.function(denoise, x, schedule, times, callback=callback, **options)
