"""Settings from a YAML file and `key=value` arguments: nested mappings that know the line of each value."""

import os
import string
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from pixart.arguments import say
from pixart.errors import InputError
from pixart.files import read_bytes
from pixart.shipped import PREFIX, find_config
from pixart.unicode import decode_text

MOST_VALUES = 10_000  # maximum number of values that aliases may add


class Settings(dict):
    """A YAML mapping with the place ("file:line") of each key's value."""

    def __init__(self, items: dict, places: dict[str, str]):
        super().__init__(items)
        self.places = places


class Items(list):
    """A YAML list with the place of each item."""

    def __init__(self, items: list, places: list[str]):
        super().__init__(items)
        self.places = places


def read_settings(path: Path, overrides: Sequence[str] = (), *, variables: bool = True) -> Settings:
    """A file's settings merged over those of its `base`, then `key=value` arguments. Paths of extensions become
    absolute.

    With `variables`, $NAME in the paths of bases and extensions is an environment variable.

    Raises:
        InputError: a file cannot be read or is not a YAML mapping, bases form a cycle, or an argument is malformed.
    """
    settings = _read(path, variables=variables)
    override_all(settings, overrides)
    return settings


def expand(text: str, name: str, place: str) -> str:
    """Replace $NAME and ${NAME} in a path by environment variables; $$ is a literal $.

    Raises:
        InputError: a variable is not set or empty; the message names the setting (`name`) and its "file:line: "
            (`place`).
    """
    if "$" not in text:
        return text
    known = {variable: value for variable, value in os.environ.items() if value}
    try:
        return string.Template(text).substitute(known)
    except KeyError as error:
        raise InputError(
            f"{place}{name}: {say(text)} uses the environment variable ${error.args[0]}, which is not set or empty; "
            "export it, or write $$ for a literal $"
        ) from None
    except ValueError:
        raise InputError(
            f"{place}{name}: {say(text)} has a $ that does not start the name of a variable; write $$ for a literal $"
        ) from None


def parse(text: str, path: str | Path, what: str) -> Any:
    """The value of a YAML text; `what` starts the message if it is not valid."""
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        if _count_values(node, {}) > MOST_VALUES + len(text):
            raise InputError(f"{what}its aliases expand to more than {MOST_VALUES} values; write them out")
        return None if node is None else _from_node(node, path)
    except yaml.YAMLError as error:
        raise InputError(f"{what}not valid YAML: {' '.join(str(error).split())[:300]}") from None
    except RecursionError:
        raise InputError(f"{what}nested too deeply; is an alias inside its own anchor?") from None


def override_all(settings: Settings, overrides: Sequence[str]) -> None:
    """Apply `key=value` arguments in order, as one layer: a preset clears its section before any of them is applied."""
    for text in overrides:
        section, _, last = text.partition("=")[0].rpartition(".")
        if section and last == "preset":
            _override(settings, f"{section}={{}}", f"override {text}, which resets {section}")
    for text in overrides:
        _override(settings, text)


def _read(path: Path, inside: tuple[Path, ...] = (), *, variables: bool) -> Settings:
    """A file's settings merged over its base's; `inside` are the files whose bases led to this one."""
    try:
        text, encoding = decode_text(read_bytes(path))
        if encoding == "Windows-1252":
            raise ValueError("it is not UTF-8; save it as UTF-8")
    except (OSError, ValueError) as error:
        by = f", the base of {inside[-1]}" if inside else ""
        raise InputError(f"config {path}{by}: cannot be read ({error})") from None
    settings = parse(text, path, f"config {path}: ")
    if settings is None:
        settings = Settings({}, {})
    if not isinstance(settings, Settings):
        kind = "list" if isinstance(settings, Items) else type(settings).__name__
        raise InputError(f"config {path}: expected keys and values, got a {kind}")
    names = settings.get("extensions")
    if isinstance(names, Items):
        named = [
            expand(str(name), "extensions", f"{at}: ") if variables else str(name)
            for name, at in zip(names, names.places, strict=True)
        ]
        settings["extensions"] = Items([str(path.parent.absolute() / name) for name in named], names.places)
    base, place = settings.pop("base", None), settings.places.pop("base", None)
    if base is None:
        return settings
    if not isinstance(base, str):
        raise InputError(f"{place}: base: got {say(base)}, expected the name of a file")
    above = _find_base(base, path, place, variables)
    if above.resolve() in [file.resolve() for file in (*inside, path)]:
        raise InputError(f"{place}: base: {base} itself starts from this file; bases must not form a cycle")
    return _merge(_read(above, (*inside, path), variables=variables), settings)


def _find_base(base: str, path: Path, place: str, variables: bool) -> Path:
    """The file that `base` in the file `path` means: a shipped configuration, or a path relative to that file."""
    if base.startswith(PREFIX):
        try:
            return find_config(base)
        except InputError as error:
            raise InputError(f"{place}: base: {error}") from None
    return path.parent / (expand(base, "base", f"{place}: ") if variables else base)


def _count_values(node: yaml.Node | None, known: dict[int, int]) -> int:
    """Number of values in a node with all aliases expanded."""
    if not isinstance(node, yaml.CollectionNode):
        return 1
    if id(node) not in known:
        known[id(node)] = 1  # an alias inside its own anchor is a cycle, reported by `_from_node`
        inside = [part for pair in node.value for part in pair] if isinstance(node, yaml.MappingNode) else node.value
        known[id(node)] = 1 + sum(_count_values(part, known) for part in inside)
    return known[id(node)]


def _from_node(node: yaml.Node, path: str | Path) -> Any:
    place = f"{path}:{node.start_mark.line + 1}"
    if isinstance(node, yaml.MappingNode):
        items, places = {}, {}
        for key_node, value_node in node.value:
            key = str(key_node.value)
            line = key_node.start_mark.line
            if key in items:
                raise InputError(f"{path}:{line + 1}: key {say(key)} is given twice")
            # the place of a section or an alias is that of its key
            if isinstance(value_node, yaml.ScalarNode):
                line = max(line, value_node.start_mark.line)
            items[key], places[key] = _from_node(value_node, path), f"{path}:{line + 1}"
        return Settings(items, places)
    if isinstance(node, yaml.SequenceNode):
        return Items(
            [_from_node(item, path) for item in node.value],
            [f"{path}:{max(item.start_mark.line, node.start_mark.line) + 1}" for item in node.value],
        )
    try:
        return yaml.SafeLoader("").construct_object(node)
    except ValueError as error:  # 2024-13-45 looks like a date
        raise InputError(f"{place}: {say(node.value)} cannot be read as {node.tag.split(':')[-1]} ({error})") from None


def _merge(base: Settings, changes: Settings) -> Settings:
    """Merge `changes` over `base`. A section with a preset replaces the base's, which would change the preset."""
    for key, value in changes.items():
        if isinstance(value, Settings) and isinstance(base.get(key), Settings) and "preset" not in value:
            _merge(base[key], value)
        else:
            base[key] = value
        base.places[key] = changes.places[key]
    return base


def _override(settings: Settings, override: str, place: str | None = None) -> None:
    key, separator, text = override.partition("=")
    if not separator:
        raise InputError(f"override {say(override)}: expected key=value, e.g. train.steps=100")
    value = parse(text, "command line", f"override {say(override)}: the value is ")
    place = place or f"override {' '.join(override.split())[:100]}"
    if isinstance(value, Items):
        value.places = [place] * len(value)
    put(settings, key, value, place)


def put(settings: Settings, key: str, value: Any, place: str) -> None:
    """Set the value of a dotted key, which was given at `place`; sections that are missing are made."""
    *sections, last = key.split(".")
    for section in sections:
        if not isinstance(settings.get(section), Settings):
            settings[section] = Settings({}, {})
            settings.places[section] = place
        settings = settings[section]
    settings[last] = value
    settings.places[last] = place
