"""Registries: named implementations that a setting can choose from, and how to add one.

    @MLPS.register("geglu")
    class GeGLU(nn.Module): ...

Then `model.mlp: geglu` selects it. Your own files register in the same way, see `pixart.extensions`.
"""

import sys
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

from pixart.arguments import say
from pixart.errors import InputError, did_you_mean

T = TypeVar("T")


class Registry(Generic[T]):
    """Names → implementations of one setting."""

    def __init__(self, setting: str):
        """`setting` is the configuration key that takes these names, for errors."""
        self.setting = setting
        self._entries: dict[str, T] = {}
        self._origins: dict[str, str] = {}  # the module that registered each

    def register(self, name: str) -> Callable[[T], T]:
        """A decorator that registers an implementation under `name`.

        Raises:
            InputError: another module has registered that name.
        """
        origin = sys._getframe(1).f_globals.get("__name__", "?")

        def add(entry: T) -> T:
            if self._origins.get(name, origin) != origin:
                raise InputError(f"{self.setting}: '{name}' is taken by {self._origins[name]}; choose another name")
            self._entries[name], self._origins[name] = entry, origin
            return entry

        return add

    def __getitem__(self, name: str) -> T:
        """The entry of that name. If there is none, raises InputError with the most similar name."""
        return self.find(name, self.setting)

    def find(self, name: str, setting: str) -> T:
        """The same for a name that comes from elsewhere, e.g. from a command's option, which the error then names."""
        if not isinstance(name, str) or name not in self._entries:
            hint = did_you_mean(name[:100], self._entries) if isinstance(name, str) else ""
            raise InputError(
                f"{setting}: there is no {say(name)}{hint} (there are {', '.join(self._entries)}; to use a file that "
                "registers another, name it as extensions: [FILE] in a configuration, --extension or extensions=)"
            )
        return self._entries[name]

    def __contains__(self, name: str) -> bool:
        return name in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)
