"""Strict configuration: YAML → frozen dataclasses, and back. Errors name file, line and key.

A file holds only differences from the defaults. `base: other.yaml` at its top starts from another file, `base:
pixart:NAME` from one that comes with pixart; `preset: NAME`
in a section starts from that class's `from_preset(NAME)`, ignoring the base's section; `key=value` arguments are
applied last. Texts that start with ~/ are paths in the home folder, and $NAME in a path is an environment variable; $$
is a literal $.
"""

import dataclasses
import difflib
import math
import os
import re
import types
import typing
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, Union

import yaml

from pixart.arguments import checked, say
from pixart.errors import InputError
from pixart.extensions import load_extensions
from pixart.invocation import command
from pixart.ranges import BOUNDS
from pixart.settings import Items, Settings, expand, override_all, read_settings
from pixart.shipped import find_config

T = TypeVar("T")
# metadata of a setting → its possible values, see `setting`; the first value is the default
MEANINGS: dict[str, tuple] = {
    "resume": ("fixed", "free", "quiet"),
    "compare": ("listed", "loss", "images", "quiet"),
    "path": (False, True, "as_written"),
    "option": (False, True),
    "diffusers": ("default", "any", "told"),
    "official": ("any", "default"),
    "start": ("told", "shown"),
    "described": (False, True),
    "unbounded": (False, True),
}
YAML_WORDS = {True: ("yes", "on"), False: ("no", "off")}  # words that YAML reads as booleans


def setting(default: Any = dataclasses.MISSING, *, factory: Any = dataclasses.MISSING, **says: Any) -> Any:
    """A dataclass field with metadata that says what the setting, or a change of it, means.

    Args:
        default, factory: as for `dataclasses.field`.
        says: metadata; what is left out is inherited from the field of the enclosing section, else the strictest value.
            resume: what happens if it changes when a run resumes. "fixed": refused, since it would be another run;
                "free": reported; "quiet": not reported.
            compare: what a difference between two runs means. "listed": only listed; "loss": their losses are not
                comparable; "images": they are validated on different images, latents or captions; "quiet": they are
                the same experiment.
            path: it may name a file or folder (for a mapping, its keys may). "as_written": it is not made absolute.
            option: a setting of sampling that not all samplers have; those that lack it refuse a value other than the
                default.
            diffusers: exporting a network to diffusers. "default": only the default can be expressed; "any": every
                value can; "told": every value can, and it is stored in diffusers' config.json, not in the tensors.
            official: likewise, exporting it to the authors' format; "any": every value can be.
            start: a difference from the network whose weights a network starts from. "told": it is reported; "shown":
                it shows in the list of tensors that are new or left out.
            described: `describe` prints a line for it; other settings are listed only if they differ from the default.
            least, above, most, below: bounds of its numbers, see `pixart.ranges`.
            unbounded: it may be infinite, or an integer of any size.
    """
    for name, value in says.items():
        assert name in BOUNDS or value in MEANINGS[name], f"{name}={say(value)}"
    return dataclasses.field(default=default, default_factory=factory, metadata=says)


def meaning(cls: type, key: str, name: str) -> Any:
    """The metadata `name` of the setting `key` (dotted, as in `flatten`) of a configuration of class `cls`."""
    found = MEANINGS[name][0]
    for part in key.split("."):
        field = cls.__dataclass_fields__[part]
        found = field.metadata.get(name, found)
        cls = typing.get_type_hints(cls)[part]
        if not dataclasses.is_dataclass(cls):  # the remaining parts are keys of a mapping
            break
    return found


def names_with(cls: type, name: str, *values: Any) -> list[str]:
    """The fields of a dataclass whose metadata `name` is one of `values`, in order."""
    return [field.name for field in dataclasses.fields(cls) if field.metadata.get(name, MEANINGS[name][0]) in values]


@checked
def load_config(cls: type[T], path: str | Path, overrides: Sequence[str] = (), *, run_code: bool = True) -> T:
    """Build `cls` from a YAML file, or a configuration that comes with pixart, and `key.sub=value` overrides.

    `path` may be a name, see `find_config`: `pixart:openmoji`.

    The file's `extensions: [FILE, …]`, relative to it, are run first, so that the names that they register are known.
    `run_code=False` does not run them; it is for the configuration stored in a run, which may be someone else's. Its
    paths were expanded when the run started, so $NAME has no meaning in it.

    Raises:
        InputError: an unreadable file, an unknown key, a wrong type, a value that the class refuses, or a path with a
            variable that is not set.
    """
    path = find_config(path)
    return build_settings(cls, read_settings(path, overrides, variables=run_code), path, run_code=run_code)


def build_settings(cls: type[T], settings: Settings, path: str | Path, *, run_code: bool = True) -> T:
    """Build `cls` from the settings that `read_settings` read from the file `path`, as `load_config` does. The settings
    may be changed by it."""
    if run_code and "study" in settings and "study" not in {field.name for field in dataclasses.fields(cls)}:
        raise InputError(f"config {path}: it has a section `study`, so it is a study: {command('study')} {path}")
    if run_code:
        _expand_paths(cls, settings)
    _drop_removed(cls, settings, strict=run_code)
    if run_code and isinstance(settings.get("extensions"), list):
        load_extensions(settings["extensions"])
    return build(cls, settings, place=f"{path}: ")


def _drop_removed(cls: type, settings: dict, *, strict: bool, where: str = "") -> None:
    """Forget settings of an earlier version, which stored runs have: a class's `removed`, here and below.

    Raises:
        InputError: if `strict`, for one that is set: the class's reason.
    """
    for name, reason in getattr(cls, "removed", {}).items():
        if settings.pop(name, None) and strict:
            place = getattr(settings, "places", {}).get(name)
            raise InputError(f"{place}: {where}{name}: {reason}" if place else f"{where}{name}: {reason}")
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        if dataclasses.is_dataclass(hints[field.name]) and isinstance(settings.get(field.name), dict):
            below = settings[field.name]
            _drop_removed(hints[field.name], below, strict=strict, where=f"{where}{field.name}.")


def override(config: T, overrides: Sequence[str]) -> T:
    """A dataclass changed by `key=value` overrides, checked like a file."""
    settings = Settings({}, {})
    override_all(settings, overrides)
    return build(type(config), settings, start=config)


def build(cls: type[T], settings: dict, where: str = "", start: T | None = None, place: str = "") -> T:
    """Build the dataclass `cls` from a mapping, strictly.

    Keys that the mapping lacks are taken from its preset, else from `start`, else from the class's defaults. For
    errors, `where` is the dotted path to the mapping and `place` is its "file:line: ".
    """
    if not isinstance(settings, dict):
        raise InputError(f"{place}expected keys and values, got a {type(settings).__name__}")
    fields = {field.name: field for field in dataclasses.fields(cls)}
    hints = typing.get_type_hints(cls)
    places = getattr(settings, "places", {})
    if "preset" in settings and hasattr(cls, "from_preset"):
        at = f"{places['preset']}: " if "preset" in places else place
        name = _convert(settings["preset"], str, f"{where}preset", at)
        try:
            start = cls.from_preset(name)
        except InputError as error:
            raise InputError(f"{at}{error}") from None
    values: dict[str, Any] = {} if start is None else {name: getattr(start, name) for name in fields}
    if rest := getattr(cls, "rest", None):  # options written beside the name they belong to
        beside = {key: value for key, value in settings.items() if key not in fields}
        settings = {key: value for key, value in settings.items() if key in fields}
        if beside:
            settings[rest] = {**(settings.get(rest) or {}), **beside}
    for key, value in settings.items():
        if key == "preset" and hasattr(cls, "from_preset"):
            continue
        name = f"{where}{key}"
        at = f"{places[key]}: " if key in places else place
        if key not in fields:
            near = _sections_with(str(key), hints) or difflib.get_close_matches(str(key), fields, n=1, cutoff=0.4)
            hint = f"; did you mean {' or '.join(repr(where + other) for other in near)}?" if near else ""
            raise InputError(f"{at}unknown key {say(name)}{hint} (there are {', '.join(sorted(fields))})")
        values[key] = _convert(value, hints[key], name, at, start=values.get(key))
    missing = [
        name
        for name, field in fields.items()
        if name not in values and field.default is field.default_factory is dataclasses.MISSING
    ]
    if missing:
        names = ", ".join(where + name for name in missing)
        raise InputError(f"{place}missing key{'s' * (len(missing) > 1)}: {names}")
    try:
        return cls(**values)
    except InputError as error:
        raise InputError(f"{_place_of(str(error), settings, place)}{error}") from None


def _place_of(error: str, settings: dict, place: str) -> str:
    """The place ("file:line: ") of the value that an error names first, by its key or dotted key."""
    found = []
    for key, at in _places(settings):
        before = r"(?<![\w.])" if "." in key else r"(?<!\w)"
        if match := re.search(rf"{before}{re.escape(key)}(?!\w)", error):
            found.append((match.start(), -len(key), at))
    return f"{min(found)[2]}: " if found else place


def _places(settings: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    """(dotted key, place of its value) of all settings."""
    for key, at in getattr(settings, "places", {}).items() if isinstance(settings, Settings) else ():
        yield prefix + key, at
        if isinstance(settings[key], Items):
            yield from ((f"{prefix}{key}[{i}]", item) for i, item in enumerate(settings[key].places))
        yield from _places(settings[key], f"{prefix}{key}.")


def _expand_paths(cls: type, settings: Settings, where: str = "") -> None:
    """Expand environment variables in the settings whose metadata says `path`."""
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        value, name, at = settings.get(field.name), where + field.name, f"{settings.places.get(field.name)}: "
        if dataclasses.is_dataclass(hints[field.name]) and isinstance(value, Settings):
            _expand_paths(hints[field.name], value, f"{name}.")
        elif not field.metadata.get("path"):
            continue
        elif isinstance(value, str):
            settings[field.name] = expand(value, name, at)
        elif isinstance(value, Settings):
            keys = {key: expand(key, name, f"{value.places[key]}: ") for key in value}
            places = {keys[key]: value.places[key] for key in value}
            settings[field.name] = Settings({keys[key]: item for key, item in value.items()}, places)


def build_written(cls: type[T], settings: Any, place: str = "") -> T:
    """Build `cls` from a file that was written by this program, possibly by a newer version.

    An unknown key is ignored if its value means that the feature is off: null, false, "none" or empty. Any other
    unknown key is an error, as in `build`.
    """
    return build(cls, _without_unknown_off(cls, settings), place=place)


def _without_unknown_off(cls: type, settings: Any) -> Any:
    if not isinstance(settings, dict):
        return settings
    hints = typing.get_type_hints(cls)
    kept = {}
    for key, value in settings.items():
        if dataclasses.is_dataclass(hints.get(key)):
            kept[key] = _without_unknown_off(hints[key], value)
        elif key in hints or not (value is None or value is False or value in ("none", "", [], {})):
            kept[key] = value
    return kept


def differences(config: Any) -> dict:
    """The values of a dataclass that differ from its class's defaults, as plain dicts and lists; every section is kept
    as a key.

    `build` makes the same dataclass from it, also in a version that has more fields, or lacks fields that are off.
    """
    held = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            held[field.name] = differences(value)
        elif field.default_factory is not dataclasses.MISSING:
            held |= {field.name: to_dict(value)} if value != field.default_factory() else {}
        elif value != field.default:  # nothing equals MISSING
            held[field.name] = to_dict(value)
    return held


def resolve_paths(config: T, before: T | None = None) -> T:
    """A dataclass that means the same in any working directory.

    In fields whose metadata says `path`, existing files and folders become absolute paths; other names, e.g. Hub ids,
    are unchanged. A path that no longer exists, but did when `before` was resolved, becomes the same as in `before`.
    """

    def resolve(name: str | None, known: Collection[str]) -> str | None:
        absolute = os.path.abspath(name) if name else name
        return absolute if name and (os.path.exists(name) or absolute in known) else name

    changes = {}
    for field in dataclasses.fields(config):
        value, old = getattr(config, field.name), getattr(before, field.name, None)
        if dataclasses.is_dataclass(value):
            changes[field.name] = resolve_paths(value, old)
        elif field.metadata.get("path") is True and isinstance(value, dict):
            changes[field.name] = {resolve(key, old or ()): item for key, item in value.items()}
        elif field.metadata.get("path") is True:
            changes[field.name] = resolve(value, (old,))
    return dataclasses.replace(config, **changes)


def to_dict(config: Any) -> Any:
    """A dataclass as plain dicts and lists, with all fields."""
    if dataclasses.is_dataclass(config):
        return {field.name: to_dict(getattr(config, field.name)) for field in dataclasses.fields(config)}
    if isinstance(config, (list, tuple)):
        return [to_dict(item) for item in config]
    return config


def flatten(settings: dict, prefix: str = "") -> dict:
    """Nested settings as one level of dotted keys."""
    flat = {}
    for key, value in settings.items():
        flat.update(flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value})
    return flat


def dump_yaml(config: Any) -> str:
    """A dataclass as YAML for `load_config`: only what differs from the defaults."""
    return yaml.safe_dump(differences(config), sort_keys=False, allow_unicode=True)


def _sections_with(key: str, hints: dict[str, Any]) -> list[str]:
    """The sections of a dataclass that have a key that was given one level too high."""
    sections = [name for name, hint in hints.items() if dataclasses.is_dataclass(hint)]
    return [f"{name}.{key}" for name in sections if key in {field.name for field in dataclasses.fields(hints[name])}]


def _convert(value: Any, hint: Any, name: str, place: str, start: Any = None) -> Any:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:  # checked by the code that reads it
        return _plain(value)
    if origin in (Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        rest = [argument for argument in arguments if argument is not type(None)]
        words = (
            [word for argument in rest if typing.get_origin(argument) is Literal for word in typing.get_args(argument)]
            if len(rest) > 1
            else []
        )
        if isinstance(value, str) and value in words:
            return value
        plain = [argument for argument in rest if not words or typing.get_origin(argument) is not Literal]
        assert len(plain) == 1, f"{name}: one type, some words and null are all that is supported"
        try:
            return _convert(value, plain[0], name, place, start)
        except InputError as error:
            if words:
                raise InputError(f"{error} or {', '.join(words)}") from None
            raise
    if dataclasses.is_dataclass(hint):
        if not isinstance(value, dict):
            raise InputError(f"{place}{name}: got {say(value)}, expected a section with keys")
        return build(hint, value, name + ".", start, place)
    if origin is Literal:
        if isinstance(value, bool) and (meant := [word for word in YAML_WORDS[value] if word in arguments]):
            return meant[0]
        if not any(value == argument and type(value) is type(argument) for argument in arguments):  # True == 1 == 1.0
            raise InputError(f"{place}{name}: got {say(value)}, expected one of {', '.join(map(str, arguments))}")
        return value
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            raise InputError(f"{place}{name}: got {say(value)}, expected a list")
        if arguments[-1] is not Ellipsis and len(value) != len(arguments):
            raise InputError(f"{place}{name}: got {len(value)} values, expected {len(arguments)}")
        item_hints = [arguments[0]] * len(value) if arguments[-1] is Ellipsis else arguments
        places = [f"{at}: " for at in value.places] if isinstance(value, Items) else [place] * len(value)
        return tuple(
            _convert(v, h, f"{name}[{i}]", at)
            for i, (v, h, at) in enumerate(zip(value, item_hints, places, strict=True))
        )
    if origin is dict:
        if not isinstance(value, dict):
            raise InputError(f"{place}{name}: got {say(value)}, expected keys and values")
        places = getattr(value, "places", {})
        items = {
            key: _convert(v, arguments[1], f"{name}.{key}", f"{places[key]}: " if key in places else place)
            for key, v in value.items()
        }
        return {**(start or {}), **items}
    return _convert_scalar(value, hint, name, place)


def _plain(value: Any) -> Any:
    """A YAML value without the places of its keys."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def _convert_scalar(value: Any, hint: type, name: str, place: str) -> Any:
    if hint is float and isinstance(value, (int, float, str)) and not isinstance(value, bool):
        try:
            number = float(value)  # YAML reads 1e-4 as a string
        except (ValueError, OverflowError):
            number = math.nan
        if not math.isnan(number):
            return number
    elif isinstance(value, hint) and not (hint is int and isinstance(value, bool)):
        return os.path.expanduser(value) if hint is str and value.startswith("~/") else value
    raise InputError(f"{place}{name}: got {say(value)}, expected {'a number' if hint is float else hint.__name__}")
