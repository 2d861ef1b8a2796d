"""The `study` section of a study's file: the arms that are compared, the seeds, and what is tested."""

import itertools
import json
import re
from collections.abc import Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

from pixart.arguments import say
from pixart.config import build, setting
from pixart.errors import InputError, did_you_mean
from pixart.ranges import check_numbers
from pixart.settings import Items, Settings, put

FIXED = ("output", "seed", "resume", "extensions", "study")  # settings of the whole study, which no arm may change


@dataclass(frozen=True)
class BudgetConfig:
    """What every arm may spend: one of these. The last step that it begins counts in full for images; for FLOPs it is
    left out."""

    steps: int | None = setting(None, least=1)
    images: int | None = setting(None, least=1)
    flops: float | None = setting(None, above=0)  # of training (forward and backward) by the networks

    def __post_init__(self):
        check_numbers(self, "study.budget")
        if len([value for value in vars(self).values() if value is not None]) > 1:
            raise InputError(
                "study.budget: got several of steps, images and flops, expected one; it is equal in all arms"
            )


@dataclass(frozen=True)
class StudyConfig:
    """How runs are compared; the settings that they share stand beside this section, as in any configuration."""

    # name → settings in which the arm differs from the shared ones: nested, or with dotted keys
    arms: dict[str, Any] = field(default_factory=dict)
    # instead: setting → its values, of which all combinations are arms; or the name of an axis → name of an alternative
    # → its settings
    axes: dict[str, Any] = field(default_factory=dict)
    seeds: tuple[int, ...] = setting((0, 1, 2), least=0, unbounded=True)  # or their number: 5 is 0 to 4
    budget: BudgetConfig = field(default_factory=BudgetConfig)  # without one, every arm takes train.steps
    # arm → what it has spent before its first step, in the unit of the budget: on the network that it starts from
    spent: dict[str, float] = setting(factory=dict, least=0)
    baseline: str | None = None  # the arm to which the others are compared; null is the first
    planted: str | None = None  # an arm known to be worse, which the study must find to be so
    # the scores that are tested; without any, the first score of every metric whose values can be compared
    metrics: tuple[str, ...] = ()
    # score → the difference that is called small; stated here, it is stated before the results are known
    margin: dict[str, float] = setting(factory=dict, above=0)
    confidence: float | None = setting(0.95, above=0, below=1)  # of the intervals; null leaves them out
    null: bool = False  # arms may be equal, which tests the study itself: their difference must be none

    def __post_init__(self):
        check_numbers(self, "study")
        if not self.arms and not self.axes:
            raise InputError("study: there are no arms; expected `arms` (name → settings) or `axes` (setting → values)")
        if self.arms and self.axes:
            raise InputError("study: got both arms and axes, expected one of them")
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise InputError(f"study.seeds: got {list(self.seeds)}, expected at least one, each once")
        if len(self.seeds) < 2 and self.confidence is not None:
            raise InputError(
                "study.seeds: got one seed, but an interval needs two at least; give more, or set study.confidence to "
                "null for a report without intervals"
            )


def read_study(settings: Settings, path: Any) -> tuple[StudyConfig, dict[str, Settings]]:
    """Take the `study` section out of a file's settings.

    Returns:
        the section, and the settings of every arm that differ from the shared ones, by dotted key.

    Raises:
        InputError: there is no such section, or it is wrong; an arm sets a key twice, or one of the whole study.
    """
    section, place = settings.pop("study", None), settings.places.pop("study", str(path))
    if not isinstance(section, Settings):
        raise InputError(f"{place}: study: got {say(section)}, expected a section with arms, seeds and a budget")
    if isinstance(count := section.get("seeds"), int) and not isinstance(count, bool):
        section["seeds"] = Items([*range(count)], [section.places["seeds"]] * max(count, 0))
    config = build(StudyConfig, deepcopy(section), "study.", place=f"{place}: ")
    arms = _cross(section["axes"]) if config.axes else _list(section["arms"])
    for name, changes in arms.items():
        for key, at in changes.places.items():
            if key.partition(".")[0] in FIXED:
                raise InputError(f"{at}: arm '{name}': {key} is the same for all arms; set it beside study")
    folders: dict[str, str] = {}
    for name in arms:
        if (other := folders.setdefault(folder_name(name), name)) != name:
            raise InputError(f"study: the arms '{name}' and '{other}' would share a folder; rename one")
    for what in ("baseline", "planted", "spent"):
        named = getattr(config, what)
        for name in named if what == "spent" else [named] * (named is not None):
            if name not in arms:
                raise InputError(
                    f"{section.places[what]}: study.{what}: there is no arm '{name}'{did_you_mean(name, arms)} "
                    f"(there are {', '.join(arms)})"
                )
    if config.spent and config.budget == BudgetConfig():
        raise InputError(f"{section.places['spent']}: study.spent: set study.budget, from which it is taken")
    if config.planted is not None and config.planted == (config.baseline or next(iter(arms))):
        raise InputError(f"study.planted: '{config.planted}' is the baseline; expected another arm")
    if len(arms) < 2:
        raise InputError(f"{place}: study: got one arm, '{next(iter(arms))}'; expected at least two to compare")
    return config, arms


def folder_name(arm: str) -> str:
    """An arm's name as the name of a folder."""
    return re.sub(r"[^\w.=+-]+", "-", arm).strip("-.") or "arm"


def flat(changes: Any, arm: str, place: str) -> Settings:
    """Nested or dotted settings by dotted key.

    Raises:
        InputError: they are no settings, or set a key twice.
    """
    if changes is None:
        changes = Settings({}, {})
    if not isinstance(changes, Settings):
        raise InputError(f"{place}: arm '{arm}': got {say(changes)}, expected settings, e.g. {{model.depth: 12}}")
    found = Settings({}, {})
    for key, value, at in _leaves(changes):
        clash = [old for old in found if old == key or f"{old}.".startswith(f"{key}.") or key.startswith(f"{old}.")]
        if clash:
            raise InputError(f"{at}: arm '{arm}': {key} conflicts with {clash[0]}, which it sets as well; keep one")
        found[key], found.places[key] = value, at
    return found


def apply(shared: Settings, changes: Settings) -> Settings:
    """A copy of the shared settings with an arm's."""
    whole = deepcopy(shared)
    for key, value in changes.items():
        put(whole, key, deepcopy(value), changes.places[key])
    return whole


def _leaves(settings: Settings, before: str = "") -> Iterator[tuple[str, Any, str]]:
    for key, value in settings.items():
        if isinstance(value, Settings) and value:
            yield from _leaves(value, f"{before}{key}.")
        else:
            yield f"{before}{key}", value, settings.places[key]


def _list(arms: Settings) -> dict[str, Settings]:
    return {name: flat(changes, name, arms.places[name]) for name, changes in arms.items()}


def _cross(axes: Settings) -> dict[str, Settings]:
    """All combinations of one alternative of each axis."""
    alternatives = [_alternatives(axis, values, axes.places[axis]) for axis, values in axes.items()]
    arms: dict[str, Settings] = {}
    for combination in itertools.product(*(axis.items() for axis in alternatives)):
        name = ", ".join(part for part, _ in combination)
        together = Settings({}, {})
        for part, changes in combination:
            for key, value in changes.items():
                if any(f"{old}.".startswith(f"{key}.") or key.startswith(f"{old}.") for old in together):
                    raise InputError(f"{changes.places[key]}: study.axes: two axes set {key} ('{part}'); keep one")
                together[key], together.places[key] = value, changes.places[key]
        arms[name] = together
    return arms


def _alternatives(axis: str, values: Any, place: str) -> Mapping[str, Settings]:
    if isinstance(values, Settings) and values:
        return {name: flat(changes, name, values.places[name]) for name, changes in values.items()}
    if not isinstance(values, Items) or not values:
        raise InputError(
            f"{place}: study.axes.{axis}: got {say(values)}, expected a list of values, or names with their settings"
        )
    named = {
        f"{axis.rpartition('.')[2]}={value if isinstance(value, str) else json.dumps(value)}": Settings(
            {axis: value}, {axis: at}
        )
        for value, at in zip(values, values.places, strict=True)
    }
    if len(named) < len(values):
        raise InputError(f"{place}: study.axes.{axis}: a value is listed twice")
    return named
