"""Strict configuration: YAML → frozen dataclasses, and back. An unknown key or a wrong type names file, line and key.

A file holds differences only. `base: other.yaml` at its top starts from another file; `preset: NAME` in a section
starts from that class's `from_preset(NAME)`, whatever the section held in the base; `key=value` arguments come last.
Texts that begin with ~/ are paths in the home folder.
"""

import dataclasses
import difflib
import math
import os
import re
import types
import typing
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, Union

import yaml

from pixart.errors import InputError
from pixart.extensions import load_extensions

T = TypeVar("T")
# what a setting may say of itself, see `setting`; the first of each is what holds where nothing is said
MEANINGS: dict[str, tuple] = {
    "resume": ("fixed", "free", "quiet"),
    "compare": ("listed", "loss", "images", "quiet"),
    "path": (False, True),
    "option": (False, True),
    "diffusers": ("default", "any", "told"),
    "start": ("told", "shown"),
    "described": (False, True),
}
YAML_WORDS = {True: ("yes", "on"), False: ("no", "off")}  # that it reads as truth values


class _Settings(dict):
    """A YAML mapping that remembers where each key stands ("file:line")."""

    def __init__(self, items: dict, places: dict[str, str]):
        super().__init__(items)
        self.places = places


def setting(default: Any = dataclasses.MISSING, *, factory: Any = dataclasses.MISSING, **says: Any) -> Any:
    """A dataclass's field that says, beside its default, what it or a change of it means.

    Args:
        default, factory: as of `dataclasses.field`.
        says: what is left out is as the section says that holds the field, else the strictest.
            resume, of a change under a run that goes on: "fixed", it would be another run and is refused; "free", it is
                told; "quiet", it is not worth telling.
            compare, of a difference between runs: "listed", that is all; "loss", their losses measure different things;
                "images", they are validated on other images, latents or captions; "quiet", they are the same
                experiment.
            path: it may name a file or folder; of a mapping, its keys may.
            option, of sampling: not every sampler has it, and one that lacks it refuses another value than the default.
            diffusers, of a network in an export: "default", another value cannot be expressed; "any", it can; "told",
                that too, and diffusers' config.json tells it, which the tensors do not.
            start, of a network that starts from another's weights: "told", a difference is; "shown", the tensors that
                are new or left out show it.
            described: `describe` has a line for it; of the others it lists those that are not as by default.
    """
    for name, value in says.items():
        assert value in MEANINGS[name], f"{name}={value!r}"
    return dataclasses.field(default=default, default_factory=factory, metadata=says)


def meaning(cls: type, key: str, name: str) -> Any:
    """What `key`, dotted as in `flatten`, of a configuration of class `cls` says of itself under `name`."""
    found = MEANINGS[name][0]
    for part in key.split("."):
        field = cls.__dataclass_fields__[part]
        found = field.metadata.get(name, found)
        cls = typing.get_type_hints(cls)[part]
        if not dataclasses.is_dataclass(cls):  # what follows are keys of a mapping
            break
    return found


def names_with(cls: type, name: str, *values: Any) -> list[str]:
    """The fields of a dataclass that say one of `values` under `name`, in their order."""
    return [field.name for field in dataclasses.fields(cls) if field.metadata.get(name, MEANINGS[name][0]) in values]


def load_config(cls: type[T], path: str | Path, overrides: Sequence[str] = (), *, run_code: bool = True) -> T:
    """Build `cls` from a YAML file and `key.sub=value` overrides.

    `extensions: [FILE, …]` of the file, relative to it, are run first, so that the names they register are known; with
    `run_code` off they are not: for the configuration that lies in a run, which may be a stranger's.

    Raises:
        InputError: unreadable file, unknown key, wrong type, or a value the class refuses.
    """
    settings = _read(Path(path))
    _override_all(settings, overrides)
    if run_code and isinstance(settings.get("extensions"), list):
        load_extensions(settings["extensions"])
    return build(cls, settings, place=f"{path}: ")


def override(config: T, overrides: Sequence[str]) -> T:
    """A dataclass with `key=value` changes, checked as in a file."""
    settings = _Settings({}, {})
    _override_all(settings, overrides)
    return build(type(config), settings, start=config)


def build(cls: type[T], settings: dict, where: str = "", start: T | None = None, place: str = "") -> T:
    """Build the dataclass `cls` from a mapping, strictly.

    Keys that the mapping lacks come from its preset, else from `start`, else from the class's defaults. For errors,
    `where` is the dotted path to the mapping and `place` the "file:line: " where it stands.
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
    for key, value in settings.items():
        if key == "preset" and hasattr(cls, "from_preset"):
            continue
        name = f"{where}{key}"
        at = f"{places[key]}: " if key in places else place
        if key not in fields:
            near = _sections_with(str(key), hints) or difflib.get_close_matches(str(key), fields, n=1, cutoff=0.4)
            hint = f"; did you mean {' or '.join(repr(where + other) for other in near)}?" if near else ""
            raise InputError(f"{at}unknown key '{name}'{hint} (there are {', '.join(sorted(fields))})")
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
        found = {key: re.search(rf"\b{re.escape(key)}\b", str(error)) for key in places}
        named = sorted((match.start(), key) for key, match in found.items() if match)  # the key to blame comes first
        raise InputError(f"{places[named[0][1]]}: {error}" if named else f"{place}{error}") from None


def build_written(cls: type[T], settings: Any, place: str = "") -> T:
    """Build `cls` from what a program wrote, maybe a newer version of this one.

    A key that is not known here is left out if its value says that what it stands for is off: null, false, "none" or
    empty. Any other is an error, as in `build`.
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
    """What of a dataclass differs from its class's defaults, as plain dicts and lists; every section stays as a key.

    What `build` makes the same dataclass of, also in a version that has more fields, or without those that are off.
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
    """A dataclass that means the same from any working directory.

    In the fields that say they are a `path`, what is there is named by its absolute path; other names, as Hub ids,
    stay. What is not there any more, but was when `before` was resolved, is named as in it.
    """

    def resolve(name: str | None, known: Collection[str]) -> str | None:
        absolute = os.path.abspath(name) if name else name
        return absolute if name and (os.path.exists(name) or absolute in known) else name

    changes = {}
    for field in dataclasses.fields(config):
        value, old = getattr(config, field.name), getattr(before, field.name, None)
        if dataclasses.is_dataclass(value):
            changes[field.name] = resolve_paths(value, old)
        elif field.metadata.get("path") and isinstance(value, dict):
            changes[field.name] = {resolve(key, old or ()): item for key, item in value.items()}
        elif field.metadata.get("path"):
            changes[field.name] = resolve(value, (old,))
    return dataclasses.replace(config, **changes)


def to_dict(config: Any) -> Any:
    """A dataclass as plain dicts and lists, every field of it."""
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
    """A dataclass as YAML that `load_config` makes it of: what differs from the defaults."""
    return yaml.safe_dump(differences(config), sort_keys=False, allow_unicode=True)


def _read(path: Path, inside: tuple[Path, ...] = ()) -> _Settings:
    """A file's settings on top of its base's; `inside` are the files that led here."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        by = f", the base of {inside[-1]}" if inside else ""
        raise InputError(f"config {path}{by}: cannot be read ({error})") from None
    settings = _parse(text, path, f"config {path}: ")
    if settings is None:
        settings = _Settings({}, {})
    if not isinstance(settings, _Settings):
        raise InputError(f"config {path}: expected keys and values, got a {type(settings).__name__}")
    if isinstance(settings.get("extensions"), list):
        settings["extensions"] = [str(path.parent.absolute() / str(name)) for name in settings["extensions"]]
    base, place = settings.pop("base", None), settings.places.pop("base", None)
    if base is None:
        return settings
    if not isinstance(base, str):
        raise InputError(f"{place}: base: got {base!r}, expected the name of a file")
    above = path.parent / base
    if above.resolve() in [file.resolve() for file in (*inside, path)]:
        raise InputError(f"{place}: base: {base} starts from this file; bases must not go round")
    return _merge(_read(above, (*inside, path)), settings)


def _parse(text: str, path: str | Path, what: str) -> Any:
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        return None if node is None else _from_node(node, path)
    except yaml.YAMLError as error:
        raise InputError(f"{what}not valid YAML: {error}") from None
    except RecursionError:
        raise InputError(f"{what}nested too deeply; does an alias stand inside its own anchor?") from None


def _from_node(node: yaml.Node, path: str | Path) -> Any:
    place = f"{path}:{node.start_mark.line + 1}"
    if isinstance(node, yaml.MappingNode):
        items, places = {}, {}
        for key_node, value_node in node.value:
            key = str(key_node.value)
            place = f"{path}:{key_node.start_mark.line + 1}"
            if key in items:
                raise InputError(f"{place}: key '{key}' stands twice")
            items[key], places[key] = _from_node(value_node, path), place
        return _Settings(items, places)
    if isinstance(node, yaml.SequenceNode):
        return [_from_node(item, path) for item in node.value]
    try:
        return yaml.SafeLoader("").construct_object(node)
    except ValueError as error:  # 2024-13-45 looks like a date
        raise InputError(f"{place}: {node.value!r} cannot be read as {node.tag.split(':')[-1]} ({error})") from None


def _sections_with(key: str, hints: dict[str, Any]) -> list[str]:
    """A dataclass's sections that have a key, which stands one level too high."""
    sections = [name for name, hint in hints.items() if dataclasses.is_dataclass(hint)]
    return [f"{name}.{key}" for name in sections if key in {field.name for field in dataclasses.fields(hints[name])}]


def _merge(base: _Settings, changes: _Settings) -> _Settings:
    """`changes` on top of `base`. A section with a preset starts anew: what stood below would change the preset."""
    for key, value in changes.items():
        if isinstance(value, _Settings) and isinstance(base.get(key), _Settings) and "preset" not in value:
            _merge(base[key], value)
        else:
            base[key] = value
        base.places[key] = changes.places[key]
    return base


def _override_all(settings: _Settings, overrides: Sequence[str]) -> None:
    """`key=value` arguments in their order, as one layer: a preset empties its section before any of them."""
    for text in overrides:
        section, _, last = text.partition("=")[0].rpartition(".")
        if section and last == "preset":
            _override(settings, f"{section}={{}}", f"override {text}, which starts {section} anew")
    for text in overrides:
        _override(settings, text)


def _override(settings: _Settings, override: str, place: str | None = None) -> None:
    key, separator, text = override.partition("=")
    if not separator:
        raise InputError(f"override '{override}': expected key=value, as in train.steps=100")
    value = _parse(text, "command line", f"override '{override}': the value is ")
    *sections, last = key.split(".")
    for section in sections:
        if not isinstance(settings.get(section), _Settings):
            settings[section] = _Settings({}, {})
            settings.places[section] = f"override {override}"
        settings = settings[section]
    settings[last] = value
    settings.places[last] = place or f"override {override}"


def _convert(value: Any, hint: Any, name: str, place: str, start: Any = None) -> Any:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:  # whoever reads it checks it
        return _plain(value)
    if origin in (Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        rest = [argument for argument in arguments if argument is not type(None)]
        words = [word for argument in rest if typing.get_origin(argument) is Literal
                 for word in typing.get_args(argument)] if len(rest) > 1 else []  # fmt: skip
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
            raise InputError(f"{place}{name}: got {value!r}, expected a section with keys")
        return build(hint, value, name + ".", start, place)
    if origin is Literal:
        if isinstance(value, bool) and (meant := [word for word in YAML_WORDS[value] if word in arguments]):
            return meant[0]
        if not any(value == argument and type(value) is type(argument) for argument in arguments):  # True == 1 == 1.0
            raise InputError(f"{place}{name}: got {value!r}, expected one of {', '.join(map(str, arguments))}")
        return value
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            raise InputError(f"{place}{name}: got {value!r}, expected a list")
        if arguments[-1] is not Ellipsis and len(value) != len(arguments):
            raise InputError(f"{place}{name}: got {len(value)} values, expected {len(arguments)}")
        item_hints = [arguments[0]] * len(value) if arguments[-1] is Ellipsis else arguments
        return tuple(
            _convert(v, h, f"{name}[{i}]", place) for i, (v, h) in enumerate(zip(value, item_hints, strict=True))
        )
    if origin is dict:
        if not isinstance(value, dict):
            raise InputError(f"{place}{name}: got {value!r}, expected keys and values")
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
    raise InputError(f"{place}{name}: got {value!r}, expected {'a number' if hint is float else hint.__name__}")
