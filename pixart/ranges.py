"""Bounds of numeric settings: declared with the field, checked when the dataclass is made."""

import dataclasses
import functools
import math
import typing
from collections.abc import Iterator, Mapping
from typing import Any

from pixart.arguments import check_types, say
from pixart.errors import InputError

BOUNDS = ("least", "above", "most", "below")
LARGEST = 2**63 - 1  # the largest integer that a tensor can hold; larger ones only in `unbounded` fields


def check_numbers(config: Any, section: str = "") -> None:
    """Refuse values of a dataclass that do not fit their annotations, and numbers that are outside of their field's
    bounds, NaN, or infinite in a field that is not `unbounded`. The items of tuples and mappings are checked one by
    one; `Any` is not checked.

    To be called in `__post_init__`; `section` is the dotted path to the dataclass in a configuration.

    Raises:
        InputError: a number is refused; the message names its key, its value and what is allowed.
    """
    check_types(config, section, paths=True)
    prefix = f"{section}." if section else ""
    checked = _checked(type(config))
    for field in dataclasses.fields(config):
        if field.name in checked:
            for name, value in _numbers(prefix + field.name, getattr(config, field.name)):
                _check(name, value, field.metadata)


def check_choices(config: Any, section: str = "") -> None:
    """Refuse texts of a dataclass that are none of the choices (`Literal`) of their field; to be called likewise.

    Raises:
        InputError: a text is refused; the message names its key and the choices.
    """
    for name, choices in _choices(type(config)).items():
        value = getattr(config, name)
        if isinstance(value, str) and value not in choices:
            key = f"{section}.{name}" if section else name
            raise InputError(f"{key}: got {say(value)}, expected one of {', '.join(map(str, choices))}")


@functools.cache
def _choices(cls: type) -> dict[str, tuple]:
    """The choices of every field that has some, alone or beside another type."""
    found = {}
    for name, hint in typing.get_type_hints(cls).items():
        for part in (hint, *typing.get_args(hint)):
            if typing.get_origin(part) is typing.Literal:
                found[name] = typing.get_args(part)
    return found


@functools.cache
def _checked(cls: type) -> set[str]:
    """The fields to check; those of type `dict[str, Any]` are checked by the code that reads them."""
    return {name for name, hint in typing.get_type_hints(cls).items() if Any not in typing.get_args(hint)}


def _numbers(name: str, value: Any) -> Iterator[tuple[str, int | float]]:
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _numbers(f"{name}.{key}", item)
    elif isinstance(value, (tuple, list)):
        for i, item in enumerate(value):
            yield from _numbers(f"{name}[{i}]", item)
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        yield name, value


def _check(name: str, value: int | float, says: Mapping[str, Any]) -> None:
    free = says.get("unbounded", False)
    fits = (
        value >= says.get("least", -math.inf)
        and (value > says["above"] if "above" in says else True)
        and value <= says.get("most", math.inf)
        and value < says.get("below", math.inf)
    ) or (free and value == math.inf)
    if isinstance(value, float):
        fits = fits and not math.isnan(value) and (free or math.isfinite(value))
    else:
        fits = fits and (free or abs(value) <= LARGEST)
    if not fits:
        raise InputError(f"{name}: got {say(value)}, expected {_words(value, says)}")


def _words(value: int | float, says: Mapping[str, Any]) -> str:
    """Describe the allowed numbers: "at least 1", "a positive number", "a number from 0 to below 1"."""
    low, high = says.get("least", says.get("above")), says.get("most", says.get("below"))
    upper = f"to below {high}" if "below" in says else f"to {high}"
    if low is None and high is None:
        return "a finite number" if isinstance(value, float) else "a whole number of at most 63 bits"
    if low is None:
        return f"a number below {high}" if "below" in says else f"at most {high}"
    if high is None:
        finite = "" if value <= LARGEST or says.get("unbounded") else ", and finite"
        if "above" in says:
            return (f"a positive number{finite}") if low == 0 else f"a number above {low}{finite}"
        return (f"at least {low}" if low else "0 or more") + finite
    return f"a number {'above' if 'above' in says else 'from'} {low} {upper}"
