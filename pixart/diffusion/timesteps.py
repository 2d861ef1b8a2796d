"""The times that a solver visits: spacings by name, from the time with the most noise downwards.

The solver calls the network at every time of the list; the end point (time 0, or the predicted x0) is the solver's own.
"""

import itertools
import math
from collections.abc import Callable, Sequence

from pixart.diffusion.schedule import TRAIN_STEPS, DiscreteSchedule, FlowSchedule, Schedule
from pixart.errors import InputError
from pixart.registry import Registry

KARRAS_RHO = 7.0  # arXiv 2206.00364, section 3
# each entry: spacing(schedule, steps, shift) → `steps` decreasing times
SPACINGS: Registry[Callable[[Schedule, int, float], list[float]]] = Registry("sample.spacing")


@SPACINGS.register("uniform")
def uniform(schedule: Schedule, steps: int, shift: float = 1.0) -> list[float]:
    """Evenly spaced from the last time of the process to 0, which is not visited.

    For a flow the times are shifted (arXiv 2403.03206, equation 23): `shift` above 1 spends more steps at high noise.
    """
    if isinstance(schedule, FlowSchedule):
        even = (1 - i / steps for i in range(steps))
        return [TRAIN_STEPS * shift * u / (1 + (shift - 1) * u) for u in even]
    return [schedule.last * (1 - i / steps) for i in range(steps)]


@SPACINGS.register("trailing")
def trailing(schedule: Schedule, steps: int, shift: float = 1.0) -> list[float]:
    """Every (1000 / steps)-th step of a discrete chain, counted from its end (arXiv 2305.08891, table 2)."""
    _discrete(schedule, "trailing")
    return [float(round(TRAIN_STEPS * (1 - i / steps)) - 1) for i in range(steps)]


@SPACINGS.register("karras")
def karras(schedule: Schedule, steps: int, shift: float = 1.0) -> list[float]:
    """Noise-to-signal ratios evenly spaced in their 7th root (arXiv 2206.00364, equation 5), from the last time of a
    discrete chain to its first."""
    _discrete(schedule, "karras")
    (a0, s0), (a1, s1) = schedule.alpha_sigma(schedule.last), schedule.alpha_sigma(0.0)
    most, least = ((s / a) ** (1 / KARRAS_RHO) for a, s in ((a0, s0), (a1, s1)))
    ratios = [(most + i / steps * (least - most)) ** KARRAS_RHO for i in range(steps)]
    return [schedule.last, *(schedule.time_of(ratio) for ratio in ratios[1:])]


def chain_times(schedule: DiscreteSchedule, steps: int) -> list[float]:
    """The times of `schedule.respace(steps)`, decreasing; both ends of the chain are visited."""
    return [float(t) for t in reversed(schedule.respace(steps).timesteps)]


def check_times(times: Sequence[float], schedule: Schedule, *, whole: bool) -> list[float]:
    """Check a list of times given by the user; `whole` for solvers that accept only integer times.

    Raises:
        InputError: not decreasing, outside the process, or fractional where integers are needed.
    """
    times = [float(t) for t in times]
    if not times or not all(math.isfinite(t) for t in times):
        raise InputError(f"sample.times: got {times}, expected at least one number")
    low = 0.0 if whole else math.ulp(0.0)
    if not (low <= times[-1] and times[0] <= schedule.last):
        raise InputError(f"sample.times: got {times[0]:g} to {times[-1]:g}, expected {schedule.last:g} to above 0")
    if rising := [(a, b) for a, b in itertools.pairwise(times) if b >= a]:
        raise InputError(f"sample.times: they must fall, got {rising[0][0]:g} before {rising[0][1]:g}")
    if whole and (odd := [t for t in times if t != int(t)]):
        raise InputError(f"sample.times: this sampler takes whole times, got {odd[0]:g}")
    return times


def last_steps(times: Sequence[float], strength: float) -> list[float]:
    """The last int(len(times) · strength) of the times: those visited when sampling starts from a noised image.

    Raises:
        InputError: a strength outside (0, 1], or one that leaves no step.
    """
    if not 0 < strength <= 1:
        raise InputError(f"strength: got {strength}, expected above 0, up to 1")
    count = int(len(times) * strength)
    if not count:
        raise InputError(f"strength {strength} of {len(times)} steps leaves none; raise strength or steps")
    return list(times[len(times) - count :])


def _discrete(schedule: Schedule, name: str) -> None:
    if not isinstance(schedule, DiscreteSchedule):
        raise InputError(f"sample.spacing '{name}' is for models with a discrete schedule; a flow takes uniform")
